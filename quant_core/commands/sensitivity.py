"""`sensitivity`: what quantizing each group of layers alone costs."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from .. import (
    SensitivityRequest,
    format_sensitivity,
    measure_sensitivity,
    parse_spec,
    usable_specs,
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
    out_file,
)
from .progress_line import ProgressLine


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("sensitivity", help="measure what quantizing each group of layers alone costs")
    add_load_arguments(parser, plan=False)
    add_generate_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument(
        "--scheme", action="append", help="as gguf/Q4_0; give it again for several; default: all that run here"
    )
    parser.add_argument("--by", default="group", help="group, of layers that do the same work, or layer")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts that are painted at once")
    parser.add_argument("--out", metavar="FILE.json", help="for `plan --sensitivity`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write what --out asks for; the exit code.

    Raises:
        QuantError: the arguments are malformed, or a load or a run fails.
    """
    prompts, seeds = given_prompts(args, "sensitivity")
    settings = replace(generate_request(argparse.Namespace(**{**vars(args), "prompt": prompts[:1]})), prompt="")
    load = load_request(argparse.Namespace(**{**vars(args), "plan": "none"}), choose_device(args.device))
    specs = [parse_spec(text) for text in args.scheme] if args.scheme else usable_specs(load)
    out = out_file(args.out)
    request = SensitivityRequest(load, specs, prompts, seeds, settings, args.by, args.batch)
    with ProgressLine("measuring") as line, quiet_libraries():
        found = measure_sensitivity(
            request, lambda done, total, label: line.show(done, total, f"{done}/{total} {label}")
        )
    text = json.dumps(found.to_dict(), indent=1)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    print(text if args.json else format_sensitivity(found))
    return 0
