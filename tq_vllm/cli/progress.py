"""Progress of long steps: one line a step, the time it takes, and its last words if it fails.

Standard library only: the set-up uses it before anything is installed.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

QUIET_SECONDS = 15  # off a terminal, a running step says so this often
LAST_LINES = 12
NEWS = re.compile(r"\s*(Collecting|Downloading|Installing|Building|Preparing|nvcc)\b")  # pip's lines worth showing


class StepFailed(Exception):
    """A step that cannot go on: what happened, and what the person at the keyboard can do."""

    def __init__(self, what: str, what_to_do: str):
        super().__init__(f"{what}. What to do: {what_to_do}")
        self.what, self.what_to_do = what, what_to_do


class StatusLine:
    """One line that tells what is going on: rewritten on a terminal, repeated every QUIET_SECONDS elsewhere."""

    def __init__(self, title: str):
        self.title, self.started, self.said = title, time.monotonic(), time.monotonic()
        self.terminal = sys.stdout.isatty()

    def elapsed(self) -> float:
        """Seconds since the line began."""
        return time.monotonic() - self.started

    def show(self, detail: str) -> None:
        """Tell the time so far, and `detail`."""
        text = f"{self.title} ... {self.elapsed():.0f} s  {detail}"
        if self.terminal:
            print("\r\033[K" + text[: shutil.get_terminal_size().columns - 1], end="", flush=True)
        elif time.monotonic() - self.said >= QUIET_SECONDS:
            self.said = time.monotonic()
            print(f"  {text[:120]}", flush=True)

    def end(self, outcome: str) -> None:
        """Leave the line with its outcome."""
        print(f"{chr(13) + chr(27) + '[K' if self.terminal else ''}{self.title}: {outcome}", flush=True)


class Progress:
    """Runs the commands of a set-up one after another; their full output goes to `log`."""

    def __init__(self, log: Path, total: int):
        self.log, self.total, self.number = log, total, 0

    def run(self, title: str, command: list[str], what_to_do: str, environment: dict[str, str] | None = None) -> None:
        """Run one step. Errors: StepFailed with the command's last lines."""
        self.number += 1
        status = StatusLine(f"[{self.number}/{self.total}] {title}")
        lines: list[str] = []
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        reader = threading.Thread(target=lambda: lines.extend(line.rstrip() for line in process.stdout), daemon=True)
        reader.start()
        try:
            while process.poll() is None:
                time.sleep(0.2)
                status.show(next((line.strip() for line in reversed(lines) if NEWS.match(line)), ""))
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        reader.join()
        self._keep(command, lines)
        if process.returncode != 0:
            status.end("failed")
            last = "\n".join(f"  | {line}" for line in lines[-LAST_LINES:])
            raise StepFailed(f"step '{title}' failed:\n{last}\n  Full output: {self.log}", what_to_do)
        status.end(f"done in {status.elapsed():.0f} s")

    def _keep(self, command: list[str], lines: list[str]) -> None:
        if self.log.parent.is_dir():
            with self.log.open("a") as log:
                print("$", *command, *lines, sep="\n", file=log)
