"""`triton_kernels` belongs to vLLM: ours is importable as tq_vllm.triton_kernels only, however tq_vllm is installed."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def run(code: str, cwd: Path, *paths: Path) -> subprocess.CompletedProcess:
    """Run `code` in a fresh interpreter, with `paths` before everything installed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built without a network and without the CUDA extension."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"  # a copy: the build leaves its folders beside setup.py
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, source / name)
    for name in ("tq_vllm", "triton_kernels"):
        shutil.copytree(REPO / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(work),
        str(source),
    ]
    subprocess.run(command, check=True, env={**os.environ, "TQ_BUILD_CUDA": "0"}, timeout=300)
    return next(work.glob("*.whl"))


def test_checkout_resolves_the_kernels_inside_the_package(tmp_path):
    result = run("import tq_vllm.triton_kernels as t; print(t.__name__)", tmp_path, REPO)
    assert result.stdout.strip() == "tq_vllm.triton_kernels", result.stderr


def test_checkout_on_the_path_refuses_the_top_level_name(tmp_path):
    result = run("import triton_kernels", tmp_path, REPO)
    assert result.returncode != 0
    assert "ImportError" in result.stderr and "import tq_vllm.triton_kernels instead" in result.stderr


def test_a_refused_import_is_what_vllm_tests_for(tmp_path):
    """vLLM decides by a trial import whether an installed triton_kernels exists (vllm.utils.import_utils)."""
    code = "from vllm.utils.import_utils import _has_module; print(_has_module('triton_kernels'))"
    result = run(code, tmp_path, REPO)
    assert result.stdout.strip().endswith("False"), result.stderr


def test_wheel_holds_the_kernels_once_and_inside_the_package(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "tq_vllm/triton_kernels/__init__.py" in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"tq_vllm"}
    assert any(name.endswith("cli/constraints-cpu.txt") for name in names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    inside = run("import tq_vllm.triton_kernels as t; print(t.__file__)", tmp_path, tmp_path / "site")
    assert inside.stdout.strip() == str(tmp_path / "site/tq_vllm/triton_kernels/__init__.py"), inside.stderr
    outside = run("import triton_kernels", tmp_path, tmp_path / "site")
    assert "ModuleNotFoundError" in outside.stderr


def test_wheel_registers_the_plugin_and_the_command(wheel):
    archive = zipfile.ZipFile(wheel)
    entry_points = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "[vllm.general_plugins]\nturboquant = tq_vllm.plugin.register:register" in entry_points
    assert "[console_scripts]\ntq-vllm = tq_vllm.cli.__main__:main" in entry_points
