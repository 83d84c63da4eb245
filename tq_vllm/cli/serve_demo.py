"""`make serve`: start a real `vllm serve`, wait until it answers, and say what cache it got.

vLLM's own output goes to a log file. The data type of weights and activations is left to vLLM ("auto": bfloat16 for the
default model), so that the demo behaves like any vLLM server.
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

from tq_vllm.cli.config_file import read_config
from tq_vllm.cli.demo_model import NAME, cache_dir, demo_model
from tq_vllm.cli.engine_log import KV_CACHE_SIZE, log_error
from tq_vllm.cli.model_config import model_shape
from tq_vllm.cli.progress import StatusLine, StepFailed
from tq_vllm.config import PRESETS, UnknownPresetError, get_config
from tq_vllm.format import TurboQuantPage

HOST = "127.0.0.1"
# On a CPU, compiling costs over a minute a start and gains nothing, and vLLM's default cache is most of the memory.
CPU_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes", str(1 << 30))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what follows `--` goes to `vllm serve` as it is."""
    parser = argparse.ArgumentParser(prog="tq-vllm serve-demo", description="Serve a model on a TurboQuant cache.")
    parser.add_argument("--model", default="", help=f"directory or Hugging Face name (default: {NAME}, embedded)")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--kv-cache-dtype", default="turboquant", help=f"{', '.join(PRESETS)}, or any of vLLM's own")
    parser.add_argument("vllm_flags", nargs="*", metavar="-- FLAGS", help="more flags of `vllm serve`")
    return parser.parse_args(argv)


def check_port(port: int) -> None:
    """Errors: StepFailed if something listens on `port` already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise StepFailed(
                f"port {port} cannot be used: {error}", "choose another one: `make serve PORT=8001`"
            ) from None


def check_model(model: str) -> None:
    """Errors: StepFailed for a path that is no directory; vLLM would look for it on the Hugging Face hub."""
    if model.startswith(("/", ".", "~")) and not Path(model).is_dir():
        raise StepFailed(
            f"MODEL={model} is not a directory",
            "name a directory with a config.json, or a model of the Hugging Face hub; "
            f"without MODEL the embedded {NAME} is served",
        )


def check_preset(kv_cache_dtype: str) -> None:
    """Errors: StepFailed for an unknown preset; vLLM would take half a minute to find out."""
    if kv_cache_dtype.startswith("turboquant:"):
        try:
            get_config(kv_cache_dtype)
        except UnknownPresetError as error:
            raise StepFailed(str(error), "choose a preset: `make serve KV_CACHE_DTYPE=turboquant`") from None


def serve_command(model: str, name: str, args: argparse.Namespace) -> list[str]:
    """The `vllm serve` command line."""
    on_cpu = importlib.metadata.version("vllm").endswith("+cpu")
    return [
        str(Path(sys.executable).with_name("vllm")), "serve", model,
        "--served-model-name", name,
        "--host", HOST, "--port", str(args.port),
        "--kv-cache-dtype", args.kv_cache_dtype,
        *(CPU_FLAGS if on_cpu else ()),
        *args.vllm_flags,
    ]  # fmt: skip


class Server:
    """A running `vllm serve` whose output goes to `log`."""

    def __init__(self, command: list[str], offline: bool, log: Path):
        self.log, self.tokens, self.last_line = log, None, ""
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", **({"HF_HUB_OFFLINE": "1"} if offline else {})}
        # A session of its own: Ctrl-C reaches this process alone, which then stops the server in order.
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        with self.log.open("w", buffering=1) as log:
            for line in self.process.stdout:
                log.write(line)
                if found := KV_CACHE_SIZE.search(line):
                    self.tokens = int(found[1].replace(",", ""))
                if said := re.search(r"\] (?P<text>\w.*)", line):
                    self.last_line = said["text"]

    def answers(self, port: int) -> bool:
        """Whether /health says 200."""
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_ready(self, port: int) -> None:
        """Return when the server answers. Errors: StepFailed with vLLM's own words if it stops before."""
        status = StatusLine("starting vLLM")
        while not self.answers(port):
            try:
                self.process.wait(0.5)
            except subprocess.TimeoutExpired:
                status.show(self.last_line)
                continue
            self.reader.join()
            status.end("failed")
            raise StepFailed(f"vLLM did not start: {self.error()}", f"see above; the whole story is in {self.log}")
        status.end(f"done in {status.elapsed():.0f} s")

    def error(self) -> str:
        """The error that stopped vLLM."""
        return log_error(self.log.read_text(errors="replace"), self.process.returncode)

    def stop(self) -> None:
        """End the server and everything it started."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def cache_line(model: str, kv_cache_dtype: str, tokens: int) -> str:
    """What the cache is and how much fits, from the engine's token count and the format's bytes."""
    if kv_cache_dtype not in PRESETS:
        return f"vLLM's own {kv_cache_dtype} cache, {tokens:,} tokens fit"
    try:
        shape = model_shape(read_config(model)[0])
    except ValueError:  # a configuration that vLLM reads and the capacity command does not: say less
        return f"{kv_cache_dtype} cache, {tokens:,} tokens fit"
    config = get_config(kv_cache_dtype)
    slots = (shape.num_full_layers + shape.num_sliding_layers) * shape.num_kv_heads  # of one token
    token_bytes = slots * TurboQuantPage(config, shape.head_dim).slot_bytes
    bf16_bytes = slots * 2 * 2 * shape.head_dim  # keys and values, two bytes a coordinate
    return (
        f"{kv_cache_dtype} cache ({config.key_label}-bit keys, {config.value_bits}-bit values), "
        f"{token_bytes:,} bytes per token, {tokens:,} tokens fit, {bf16_bytes / token_bytes:.2f} times as many as bf16"
    )


def curl_line(port: int, name: str) -> str:
    """A request to copy."""
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": name, "messages": [question], "temperature": 0}
    return (
        f"curl -s http://{HOST}:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    )


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped; 0 after Ctrl-C, 1 if the server could not start or stopped by itself."""
    args = parse(argv)
    server = None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop in order, as on Ctrl-C
    try:
        check_preset(args.kv_cache_dtype)
        check_port(args.port)
        check_model(args.model)
        if not args.model and not (cache_dir() / NAME).exists():
            print(f"converting the default model into {cache_dir()} (once, some seconds) ...", flush=True)
        model = args.model or str(demo_model())
        name = args.model or NAME
        log = cache_dir() / f"serve-{args.port}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        server = Server(serve_command(model, name, args), Path(model).is_dir(), log)
        server.wait_until_ready(args.port)
        print(f"tq_vllm: ready: {cache_line(model, args.kv_cache_dtype, server.tokens)}")
        print(curl_line(args.port, name))
        print(f"(vLLM's log: {log}; Ctrl-C stops the server)", flush=True)
        server.process.wait()
        raise StepFailed(f"vLLM stopped: {server.error()}", f"read {log}, then start it again")
    except (StepFailed, FileNotFoundError) as failure:
        what_to_do = getattr(failure, "what_to_do", "run `make serve` again")
        print(f"tq_vllm: {getattr(failure, 'what', failure)}\n  What to do: {what_to_do}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntq_vllm: stopping the server", flush=True)
        return 0
    finally:
        if server is not None:
            server.stop()


if __name__ == "__main__":
    sys.exit(main())
