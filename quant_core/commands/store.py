"""`store`: what is kept of quantized components, listed, verified or pruned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .. import OFF, SpecError, Store, default_store, parse_size
from ..compiled_code import code_size, remove_code
from ..errors import gib
from ..store import format_entries


def add(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser."""
    parser = commands.add_parser("store", help="what is kept of quantized components")
    parser.add_argument("action", choices=("list", "verify", "prune"), help="prune: down to --limit, or all")
    parser.add_argument("--store", metavar="FOLDER", help="default: QUANTIZED_DIFFUSERS_STORE or the user's cache")
    parser.add_argument("--limit", metavar="SIZE", help="to prune to, as 20GiB; those used longest ago go first")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do the action and print what it found; the exit code, 1 if an entry is damaged.

    Raises:
        SpecError: an argument is malformed or has no effect, or the store is off.
    """
    if args.store == "":
        raise SpecError("--store is empty; name a folder.")
    folder = Path(args.store or default_store()).expanduser()
    if str(folder).lower() == OFF:
        raise SpecError("The store is off; name one with --store FOLDER.")
    if folder.exists() and not folder.is_dir():
        raise SpecError(f"The store is {folder}, which is no folder; name one with --store FOLDER.")
    if args.limit is not None and args.action != "prune":
        raise SpecError(f"--limit has no effect on store {args.action}; it belongs to store prune.")
    store = Store(folder)
    if args.action == "verify":
        wrong = store.verify()
        lines = [f"{name}: {why or 'sound'}" for name, why in sorted(wrong.items())] or [f"no entries in {folder}"]
        print(json.dumps({"entries": wrong}, indent=1) if args.json else "\n".join(lines))
        return int(any(wrong.values()))
    removes = args.action == "prune"
    limit = parse_size(args.limit, "--limit") if args.limit is not None else 0
    entries = store.prune(limit) if removes else store.entries()
    code = code_size(folder)
    if removes and not limit:
        remove_code(folder)
    if args.json:
        rows = [{"name": entry.folder.name, "bytes": entry.size, **entry.manifest} for entry in entries]
        found = {"folder": str(folder), "removed" if removes else "entries": rows, "compiled_code": code_size(folder)}
        print(json.dumps(found, indent=1))
    else:
        print(format_entries(entries, f"removed from {folder}" if removes else f"in all in {folder}"))
        if code:
            what = "removed" if removes and not limit else "which PyTorch keeps"
            print(f"{gib(code):>11}  compiled code, {what}")
        if aside := store.aside():
            print(
                f"{gib(sum(aside.values())):>11}  set aside as damaged, which store prune removes: {', '.join(aside)}"
            )
    return 0
