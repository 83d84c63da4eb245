"""The `tq-vllm` command: doctor, capacity, presets, eval."""

import argparse
import os
import sys

from tq_vllm import __version__

FROM_VLLM = ("torch", "transformers")  # packages that are not requirements of this one: they come with vLLM


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.\n")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 success, 1 something is wrong (doctor), 2 bad input, said in one sentence on stderr."""
    about = "TurboQuant KV cache for vLLM: what fits, what runs, what is stored, what it costs in quality."
    parser = _Parser(prog="tq-vllm", description=about)
    parser.add_argument("--version", action="version", version=f"tq-vllm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    try:
        from tq_vllm.cli import capacity, doctor, eval, presets

        for command in (doctor, capacity, presets, eval):
            command.add_parser(commands)
        arguments = parser.parse_args(argv)
        status = arguments.run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        if error.name not in FROM_VLLM:
            raise
        print(f"tq-vllm needs {error.name}, which comes with vLLM: pip install vllm.", file=sys.stderr)
    except ValueError as error:
        print(f"tq-vllm {arguments.command}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
