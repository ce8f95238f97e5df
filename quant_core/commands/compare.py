"""`compare`: what plans cost in quality, against the 16-bit reference."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from .. import (
    CompareRequest,
    chart,
    compare,
    comparison_csv,
    comparison_data,
    differences,
    format_comparison,
    grid,
    labelled,
    parse_plan,
)
from ..availability import quiet_libraries
from .arguments import (
    add_generate_arguments,
    add_load_arguments,
    add_prompt_arguments,
    choose_device,
    generate_request,
    given_prompts,
    load_request,
    out_folder,
    plan_text,
)
from .progress_line import ProgressLine


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("compare", help="measure what plans cost in quality, against 16 bit")
    add_load_arguments(parser, plans=True)
    add_generate_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--out", metavar="FOLDER", help="for pictures, chart, JSON and CSV; made if it is not there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, print the table, and write what --out asks for; the exit code.

    Raises:
        QuantError: the arguments are malformed, or a load or a run fails.
    """
    prompts, seeds = given_prompts(args, "compare")
    settings = generate_request(argparse.Namespace(**{**vars(args), "prompt": prompts[:1]}))
    plans = labelled((text.strip(), parse_plan(plan_text(text))) for text in args.plan)
    load = load_request(argparse.Namespace(**{**vars(args), "plan": "none"}), choose_device(args.device))
    request = CompareRequest(load, plans, prompts, seeds, replace(settings, prompt=""))
    out = out_folder(args.out)
    with ProgressLine("comparing") as line, quiet_libraries():
        found = compare(request, lambda done, total, label: line.show(done, total, f"{done}/{total} {label}"))
    data = comparison_data(found)
    if out:
        out.mkdir(exist_ok=True)
        for name, draw in (("grid", grid), ("differences", differences), ("chart", chart)):
            draw(found).save(out / f"{name}.png")
        (out / "comparison.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (out / "comparison.csv").write_text(comparison_csv(found), encoding="utf-8")
    print(json.dumps(data, indent=1) if args.json else format_comparison(found))
    return 0
