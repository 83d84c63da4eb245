# make serve   an OpenAI-compatible vLLM server on a TurboQuant cache, installed and started
# make test    the tests, with everything they need installed
# Variables: MODEL PORT KV_CACHE_DTYPE ARGS (more `vllm serve` flags), TORCH_INDEX_URL, TESTS (paths or pytest flags).

PORT ?= 8000
KV_CACHE_DTYPE ?= turboquant
MODEL ?=
ARGS ?=
TESTS ?= tests
PYTHON ?= python3

export TORCH_INDEX_URL

.PHONY: serve test build lint clean

serve:
	@$(PYTHON) -m tq_vllm.cli.bootstrap serve
	@exec .venv/bin/python -m tq_vllm.cli.serve_demo --model "$(MODEL)" --port $(PORT) --kv-cache-dtype $(KV_CACHE_DTYPE) -- $(ARGS)

test:
	@$(PYTHON) -m tq_vllm.cli.bootstrap test
	@.venv/bin/python -m tq_vllm.cli.demo_model
	HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 .venv/bin/python -m pytest -n auto --dist loadscope --no-loadscope-reorder $(TESTS)

build:
	@$(PYTHON) -m tq_vllm.cli.bootstrap serve
	TQ_BUILD_CUDA=1 .venv/bin/python setup.py build_ext --inplace

lint:
	@$(PYTHON) -m tq_vllm.cli.bootstrap test
	.venv/bin/ruff check .

clean:
	rm -rf .venv build dist .pytest_cache .hypothesis .ruff_cache *.egg-info
	find tq_vllm triton_kernels tests -name __pycache__ -prune -exec rm -rf {} +
