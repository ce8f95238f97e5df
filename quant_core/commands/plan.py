"""`plan`: the plan with the least expected error that fits into a budget."""

from __future__ import annotations

import argparse
import json

from .. import AutoPlanRequest, auto_plan, auto_plan_data, format_auto_plan, parse_size, read_sensitivity
from .arguments import (
    add_generate_arguments,
    add_load_arguments,
    choose_device,
    generate_request,
    load_request,
    out_file,
)


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("plan", help="find the plan with the least expected error that fits; loads nothing")
    add_load_arguments(parser, plan=False)
    add_generate_arguments(parser)
    parser.add_argument("--prompt", action="append", help="give it again for several; default: one of 60 words")
    parser.add_argument("--budget", required=True, help="as 8GiB, or 8G for the same")
    parser.add_argument(
        "--fits",
        default="in turn",
        help="what has to fit: 'in turn' the component in use, 'together' all of them, 'weights' their weights alone",
    )
    parser.add_argument("--sensitivity", metavar="FILE.json", help="that `sensitivity` wrote, of this model")
    parser.add_argument("--out", metavar="FILE.json", help="for the plan, which --plan takes")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan and why it is this one; the exit code.

    Raises:
        QuantError: the arguments are malformed, or no plan fits.
    """
    load = load_request(argparse.Namespace(**{**vars(args), "plan": "none"}), choose_device(args.device))
    data = read_sensitivity(args.sensitivity) if args.sensitivity is not None else None
    found = auto_plan(
        AutoPlanRequest(load, generate_request(args), parse_size(args.budget, "--budget"), args.fits, data)
    )
    if out := out_file(args.out):
        out.write_text(json.dumps(found.plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    print(json.dumps(auto_plan_data(found), indent=1) if args.json else format_auto_plan(found))
    return 0
