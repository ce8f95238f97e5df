"""`save`: a pipeline as a diffusers folder, quantized."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from .. import check_target, format_saved, save_pipeline
from .arguments import add_load_arguments, load
from .progress_line import ProgressLine


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("save", help="write a pipeline as a diffusers folder, quantized as planned")
    add_load_arguments(parser)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="that is not there yet")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, save, and print what each component became; the exit code.

    Raises:
        QuantError: the arguments are malformed, the load fails, or the folder cannot be written.
    """
    folder = Path(args.out).expanduser()
    check_target(folder)
    pipeline, _ = load(args)
    with ProgressLine("saving") as line:
        saved = save_pipeline(pipeline, folder, line.load)
    if args.json:
        parts = [asdict(part) | {"opened_by_its_library": not part.obstacle} for part in saved]
        print(json.dumps({"folder": str(folder), "components": parts}, indent=1))
    else:
        print(format_saved(saved, folder))
    return 0
