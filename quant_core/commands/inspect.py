"""`inspect`: how each component of a loaded pipeline is stored."""

from __future__ import annotations

import argparse
import json

from .. import format_report, inspect_pipeline, report_data
from .arguments import add_load_arguments, load


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("inspect", help="load and say how each component is stored")
    add_load_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load and print the inspection; the exit code.

    Raises:
        QuantError: the arguments are malformed, or the load fails.
    """
    pipeline, _ = load(args)
    reports = inspect_pipeline(pipeline)
    print(json.dumps(report_data(reports), indent=1) if args.json else format_report(reports))
    return 0
