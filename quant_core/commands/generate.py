"""`generate`: images from a prompt, as PNG."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

from .. import SpecError, format_runs, generate, inspect_pipeline, manage, optimize, report_data
from ..managing import on_device
from ..picture import describe, save_png
from .arguments import (
    add_generate_arguments,
    add_load_arguments,
    add_optimize_arguments,
    generate_request,
    load,
    optimization,
)
from .progress_line import ProgressLine


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("generate", help="make images from a prompt")
    add_load_arguments(parser)
    add_generate_arguments(parser)
    add_optimize_arguments(parser)
    parser.add_argument("--prompt", required=True, action="append", help="give it again for several")
    parser.add_argument(
        "--out", required=True, metavar="FILE.png", help="of several images: FILE-0.png, FILE-1.png, ..."
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Load, generate and save, and print where; the exit code.

    Raises:
        QuantError: the arguments are malformed, the load or the run fails, or the file cannot be written.
    """
    out = _picture_path(args.out)
    request, wanted = generate_request(args), optimization(args)
    began = time.perf_counter()
    pipeline, device = load(args)
    if wanted.offload is None:
        on_device(pipeline, device)
    elif wanted.offload.way == "managed":
        manage(pipeline, torch.device(device))
    pipeline = optimize(pipeline, wanted, device)
    loaded = time.perf_counter()
    with ProgressLine("generating") as line:
        images = generate(pipeline, request, line.step)
    done = time.perf_counter()
    record = describe(pipeline, request, args.model)
    try:
        files = save_png(images, out, record)
    except OSError as error:
        raise SpecError(f"{out} cannot be written ({error.strerror}); choose another --out.") from error
    seconds = {"load": round(loaded - began, 2), "generate": round(done - loaded, 2)}
    if args.json:
        report = report_data(inspect_pipeline(pipeline))
        runs = {part: report.data() for part, report in pipeline.reports.items()}
        made = {"files": [str(file) for file in files], "seconds": seconds, "runs": runs, "notices": pipeline.notices}
        made["inspection"] = report
        print(json.dumps({**record, **made}, indent=1))
    else:
        print(f"{', '.join(map(str, files))}: loaded in {seconds['load']} s, generated in {seconds['generate']} s")
        if text := format_runs(pipeline):
            print(text)
    for notice in pipeline.notices:
        print(notice, file=sys.stderr)
    return 0


def _picture_path(text: str) -> Path:
    out = Path(text)
    if out.suffix.lower() != ".png":
        raise SpecError(f"--out is {text}; it must end in .png.")
    if out.is_dir():
        raise SpecError(f"--out is {text}, which is a folder; name a file.")
    if out.parent.is_dir() and not os.access(out.parent, os.W_OK):
        raise SpecError(f"--out is {text}, and the folder {out.parent} cannot be written.")
    if not out.parent.is_dir():
        raise SpecError(f"--out is {text}, and the folder {out.parent} does not exist.")
    return out
