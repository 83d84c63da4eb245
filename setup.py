"""Builds the CUDA library when it can be built; everything else about the package is in pyproject.toml."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

# Sources that are compiled once for each value of macros: head sizes; for attention also query rows of a block.
INSTANCES = {
    "store_kv_instance": [{"TQ_HEAD_DIM": d} for d in (64, 80, 96, 112, 128, 192, 256)],
    "decode_instance": [
        {"TQ_HEAD_DIM": d, "TQ_ROWS": rows}
        for d, of_block in ((64, (4, 8, 16, 24, 32)), (128, (4, 8, 16, 24, 32)), (256, (4, 16)))
        for rows in of_block
    ],
}
ARCHITECTURES = os.environ.get("TQ_CUDA_ARCHS", "80 90 100 120").split()


def wants_cuda() -> bool:
    """TQ_BUILD_CUDA=1 builds, TQ_BUILD_CUDA=0 does not; unset, it is built when nvcc is found."""
    choice = os.environ.get("TQ_BUILD_CUDA")
    wanted = choice == "1" or (choice is None and shutil.which("nvcc") is not None)
    why = f"TQ_BUILD_CUDA={choice}" if choice is not None else f"nvcc {'found' if wanted else 'not found'}"
    print(f"tq_vllm: CUDA library {'will be built' if wanted else 'is not built'} ({why})")
    return wanted


class BuildCuda(build_ext):
    """Compiles csrc/*.cu into tq_vllm/libtq_cuda.so: a plain C library with the CUDA runtime inside.

    Machine code for every compute capability of TQ_CUDA_ARCHS (default 80 90 100 120) and PTX of the last for what
    comes after it. Objects newer than every source are kept.
    """

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        if not Path(nvcc).exists():
            raise SystemExit("No nvcc on the PATH: install the CUDA toolkit (12.8 or later), or set TQ_BUILD_CUDA=0.")
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=default"]
        flags += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
        flags += [f"-gencode=arch=compute_{ARCHITECTURES[-1]},code=compute_{ARCHITECTURES[-1]}"]
        objects = Path(self.build_temp, "csrc-" + "-".join(ARCHITECTURES))
        objects.mkdir(parents=True, exist_ok=True)
        newest = max(path.stat().st_mtime for path in [*Path("csrc").iterdir(), Path(__file__)])

        def compile_one(job: tuple[str, str, list[str]]) -> str:
            source, name, defines = job
            target = objects / f"{name}.o"
            if not target.exists() or target.stat().st_mtime < newest:
                print(f"nvcc {name}", flush=True)
                subprocess.run([nvcc, *flags, *defines, "-c", source, "-o", str(target)], check=True)
            return str(target)

        jobs = []
        for source in sorted(ext.sources):
            name = Path(source).stem
            for macros in INSTANCES.get(name, [{}]):
                label = "_".join([name, *map(str, macros.values())])
                jobs.append((source, label, [f"-D{macro}={value}" for macro, value in macros.items()]))
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            compiled = list(pool.map(compile_one, jobs))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([nvcc, "-shared", "-cudart", "static", *compiled, "-o", str(library)], check=True)


class PlatformWheel(bdist_wheel):
    """One wheel for a platform: the library depends on no Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def cuda_library() -> dict:
    """The setup() arguments that build and package tq_vllm/libtq_cuda.so."""
    sources = [str(path) for path in Path("csrc").glob("*.cu")]
    return {
        "ext_modules": [Extension("tq_vllm.libtq_cuda", sources)],
        "cmdclass": {"build_ext": BuildCuda, "bdist_wheel": PlatformWheel},
    }


setup(**(cuda_library() if Path("csrc").is_dir() and wants_cuda() else {}))
