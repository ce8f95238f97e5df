"""The command line: `python -m quant_core COMMAND`."""

from __future__ import annotations

import os
import sys
from importlib import import_module

from .commands.parser import Parser
from .errors import QuantError

COMMANDS = (  # each a file of `commands/`
    "backends",
    "compare",
    "estimate",
    "generate",
    "inspect",
    "plan",
    "save",
    "sensitivity",
    "store",
)
_BAD_INPUT = 2  # argparse's own


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, or 2 with one sentence on stderr for bad input.

    It is 1 if `store verify` finds damage, and 130 if the user stops it. Bad usage raises SystemExit, as in argparse.
    """
    parser = Parser(prog="python -m quant_core", description="Quantized diffusers pipelines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name in COMMANDS:
        import_module(f".commands.{name}", __package__).add(commands)
    args = parser.parse_args(arguments)
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except QuantError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _BAD_INPUT
    except BrokenPipeError:  # as under `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
