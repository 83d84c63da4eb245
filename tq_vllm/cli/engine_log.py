"""What vLLM's log says: the error that stopped it, the size of its cache."""

import re

KV_CACHE_SIZE = re.compile(r"KV cache size: ([\d,]+) tokens")
_ERROR = re.compile(r"(?:\b\w+Error\b: |Value error, |\berror: )(?P<message>.+)")
_WRAPPERS = ("Engine core initialization failed", "EngineCore encountered an issue", "WorkerProc initialization failed")


def log_error(text: str, returncode: int) -> str:
    """The error that stopped vLLM, out of its log: the last that does not merely report another."""
    found = [m["message"].strip() for line in text.splitlines() if (m := _ERROR.search(line))]
    causes = [message for message in found if not message.startswith(_WRAPPERS)]
    return (causes or found or [f"it left with exit code {returncode}"])[-1]
