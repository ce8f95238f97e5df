"""`estimate`: what a plan takes, and whether that fits."""

from __future__ import annotations

import argparse
import json

from .. import estimate, estimate_data, format_estimate, parse_size, what_fits
from .arguments import add_generate_arguments, add_load_arguments, choose_device, generate_request, load_request


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("estimate", help="say what it costs, loading nothing")
    add_load_arguments(parser)
    add_generate_arguments(parser)
    parser.add_argument("--prompt", action="append", help="give it again for several; default: one of 60 words")
    parser.add_argument("--budget", help="as 8GiB, or 8G for the same: say whether it fits, or what would")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; the exit code.

    Raises:
        QuantError: the arguments are malformed, or cannot be estimated.
    """
    budget = parse_size(args.budget, "--budget") if args.budget is not None else None
    request = generate_request(args)
    device = args.device if args.device == "cuda" else choose_device(args.device)  # also of absent GPUs
    load = load_request(args, device)
    found = estimate(load, request)
    data, lines = estimate_data(found), [format_estimate(found)]
    if budget is not None:
        advice = what_fits(found, load, request, budget)
        data |= {"budget": budget, "fits": found.peak_streamed <= budget, "advice": advice}
        lines.append(advice)
    print(json.dumps(data, indent=1) if args.json else "\n".join(lines))
    return 0
