"""`inspect`: how each component of a loaded pipeline is stored."""

from __future__ import annotations

import argparse
import json

from .. import (
    THEMES,
    format_layers,
    format_report,
    inspect_layers,
    inspect_pipeline,
    inspection_picture,
    layer_data,
    peak_data,
    peak_report,
    report_data,
)
from .arguments import add_load_arguments, load, out_folder
from .progress_line import ProgressLine

_FILES = {"light": "inspection.png", "dark": "inspection-dark.png"}


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("inspect", help="load and say how each component is stored")
    add_load_arguments(parser)
    parser.add_argument("--layers", action="store_true", help="measure the error of each layer, and list them")
    parser.add_argument("--out", metavar="FOLDER", help="for pictures and JSON, with errors; made if it is not there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, print the inspection, and write what --out asks for; the exit code.

    Raises:
        QuantError: the arguments are malformed, or the load fails.
    """
    out = out_folder(args.out)
    pipeline, _ = load(args)
    reports, layers = inspect_pipeline(pipeline), []
    if out or args.layers:
        with ProgressLine("measuring") as line:
            layers = inspect_layers(
                pipeline, True, lambda done, total, label: line.show(done, total, f"{done}/{total} {label}")
            )
    data, more = report_data(reports), {"layers": layer_data(layers)}
    if out:
        peak = peak_report(pipeline)
        out.mkdir(exist_ok=True)
        for theme in THEMES:
            inspection_picture(reports, layers, peak, pipeline.title, theme).save(out / _FILES[theme])
        whole = json.dumps(data | more | {"peak": peak_data(peak) if peak else None}, indent=1)
        (out / "inspection.json").write_text(whole + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(data | more if args.layers else data, indent=1))
    else:
        print(format_report(reports), *([f"\n{format_layers(layers)}"] if args.layers else []), sep="\n")
    return 0
