"""`backends`: every backend with its schemes and options."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .. import Backend, backends, missing


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("backends", help="what can quantize, and whether it is installed")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print the README's table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list; the exit code."""
    rows = [_row(backend) for backend in backends().values()]
    if args.json:
        print(json.dumps(rows, indent=1))
    elif args.markdown:
        print(_markdown(rows))
    else:
        print("\n".join(_lines(rows)))
    return 0


def _row(backend: Backend) -> dict[str, Any]:
    return {
        "backend": backend.name,
        "title": backend.title,
        "installed": not missing(backend.requires),
        "install": "pip install " + " ".join(map(repr, backend.requires)),
        "notice": backend.notice,
        "mixes": backend.mixes,
        "schemes": [
            {"scheme": scheme.name, "bits": scheme.bits, "devices": scheme.devices, "help": scheme.help}
            for scheme in backend.schemes
        ],
        "options": [
            {"option": option.name, "default": option.default, "choices": option.choices, "help": option.help}
            for option in backend.options
        ],
    }


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        absent = "" if row["installed"] else f" (missing: {row['install']})"
        lines.append(f"{row['backend']}: {row['title']}{absent}")
        if row["notice"]:
            lines.append(f"  {row['notice']}")
        for scheme in row["schemes"]:
            lines.append(f"  {scheme['scheme']:<14}{'/'.join(scheme['devices']):<9}  {scheme['help']}")
        for option in row["options"]:
            lines.append(f"  ?{option['option']}={option['default']}  {option['help']}")
    return lines


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| backend | scheme | bits | runs on | |", "|---|---|---|---|---|"]
    for row in rows:
        for number, scheme in enumerate(row["schemes"]):
            first = f"**{row['backend']}**" if number == 0 else ""
            runs_on = "CUDA only" if tuple(scheme["devices"]) == ("cuda",) else "CPU, CUDA"
            bits = f"{scheme['bits']:g}" if scheme["bits"] else "any"
            lines.append(f"| {first} | `{scheme['scheme']}` | {bits} | {runs_on} | {scheme['help']} |")
    return "\n".join(lines)
