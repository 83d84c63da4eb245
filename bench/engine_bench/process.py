"""One process of vLLM: its output in a log, its last line on the progress line, its error in one sentence."""

import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

from tq_vllm.cli.engine_log import KV_CACHE_SIZE, log_error
from tq_vllm.cli.progress import StatusLine

BENCH_DIRECTORY = Path(__file__).parents[1]
REPOSITORY = BENCH_DIRECTORY.parent


class RowFailedError(RuntimeError):
    """No figures for a cache dtype: its engine did not start, stopped, or took too long. The text is the reason."""


def kv_tokens(text: str) -> int | None:
    """Tokens of KV cache that the engine reports in its log."""
    found = KV_CACHE_SIZE.search(text)
    return int(found[1].replace(",", "")) if found else None


class EngineProcess:
    """A command in a process group of its own; leaving the `with` block ends the whole group."""

    def __init__(self, title: str, command: list[str], log: Path, timeout: float, environment: dict[str, str]):
        self.log, self.status = log, StatusLine(title)
        self.deadline, self.timeout = time.monotonic() + timeout, timeout
        self.last_line = ""
        path = os.pathsep.join(filter(None, [str(BENCH_DIRECTORY), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            command,
            env=os.environ | {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,  # progress bars end their lines with \r, which this reads as an end of line
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.log.open("w", buffering=1) as log:
            for line in self.process.stdout:
                log.write(line)
                if said := re.sub(r"^.*?\] |^\(.*?\) ", "", line).strip():
                    self.last_line = said

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, *_) -> None:
        for kill in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kill)
            except ProcessLookupError:  # the group is gone
                break
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()
        self.reader.join(5)

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait(self) -> str:
        """Wait for the end of the command and return its log. Raises: RowFailedError."""
        while self.running():
            time.sleep(0.2)
        self.reader.join(5)
        if self.process.returncode:
            raise RowFailedError(log_error(self.text(), self.process.returncode))
        return self.text()

    def running(self) -> bool:
        """Whether the command still runs; shows where it is. Raises: RowFailedError past the time limit."""
        if time.monotonic() > self.deadline:
            raise RowFailedError(f"not done after {self.timeout:.0f} s; last line of its log: {self.last_line[:200]}")
        self.status.show(self.last_line)
        return self.process.poll() is None
