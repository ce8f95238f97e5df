"""The speed table as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from speed_rows import COMPILES, EAGER_NF4, GUIDE, MEMORIES, SCHEMES, SIDES, Row, why_not
from speed_targets import Verdict, failures, measured, peak, seconds

GIB = 2**30
# heading -> column -> a figure of a row, as text
FIGURES: dict[str, dict[str, Callable[[dict], str]]] = {
    "Seconds of an image but the first": {
        "seconds": lambda found: f"{seconds(found):.3f}",
        "of a step": lambda found: f"{statistics.median(found['steps']):.4f}",
    },
    "GiB at most, for an image but the first": {
        "allocated": lambda found: f"{peak(found) / GIB:.3f}",
        "reserved": lambda found: f"{found['peak']['later']['reserved'] / GIB:.3f}",
        "first image": lambda found: f"{found['peak']['first']['allocated'] / GIB:.3f}",
    },
    "Seconds until there is an image": {
        "load": lambda found: f"{found['load']:.2f}{' *' if 'stored' in found.get('origins', {}).values() else ''}",
        "first image": lambda found: f"{found['first']:.2f}",
    },
}
RATIOS = {"Seconds of an image but the first": seconds, "GiB at most, for an image but the first": peak}
NOTES = f"""Each row runs in a process of its own, diffusers' and ours one after the other, and compiles from nothing.
Text encoders run for every image, which has a prompt of its own. `of eager` is the ratio to {EAGER_NF4}.
Weights are random: right for speed and memory, not for pictures. nf4 is of transformer and T5, the others of the
transformer alone. Of diffusers' T5 in nf4 transformers leaves `wo` in 16 bit. A load with * quantized and wrote the
store, from which the other rows of that scheme are loaded."""


def page(results: dict[str, Any], found: list[Verdict]) -> str:
    """The results as Markdown."""
    settings = results["settings"]
    head = [
        f"# Speed and memory beside plain diffusers: {settings['scale']}",
        "",
        f"`python benchmarks/gpu.py --scale {settings['scale']} --device {settings['device']}`, {results['machine']}.",
        "",
        f"{settings['size']} x {settings['size']} pixels, {settings['steps']} steps, {settings['tokens']} tokens, "
        f"median of {settings['images']} images after the first.",
        "",
        *NOTES.splitlines(),
        "",
        "| compile | diffusers | ours |",
        "|---|---|---|",
        *(f"| {name} | {way.diffusers or '-'} | `{way.ours}` |" for name, way in COMPILES.items()),
        "",
        *(f"- {name}: {text}" for name, text in MEMORIES.items()),
    ]
    return "\n".join([*head, "", *tables(results), "", *targets(results, found), ""])


def targets(results: dict[str, Any], found: list[Verdict]) -> list[str]:
    """What the targets came to."""
    words = {True: "met", False: "MISSED", None: "not told"}
    lines = ["## Targets", "", *(f"- {words[verdict.met]}: {verdict.text}." for verdict in found)]
    if results["settings"]["device"] == "cpu":
        lines += ["", "On a CPU these are no targets: the figures show that everything runs."]
    return [*lines, *(f"- FAILED: {line}" for line in failures(results))]


def tables(results: dict[str, Any]) -> list[str]:
    """The figures, and what has none."""
    rows = measured(results)
    named = [Row(*name.split(", ")) for name in results["rows"]]
    cases = [
        (scheme, memory, compiled)
        for scheme in SCHEMES
        for memory in MEMORIES
        for compiled in COMPILES
        if any(row[1:] == (scheme, compiled, memory) for row in named)
    ]
    lines = ["## The guide's three rows", "", *_guide(rows), ""]
    for heading in FIGURES:
        lines += [f"## {heading}", "", *_table(heading, rows, cases, results), ""]
    lines += ["## What has no figures", ""]
    lines += [f"- {name}: {found['error']}" for name, found in results["rows"].items() if "error" in found] or ["-"]
    return lines


def _guide(rows: dict[Row, dict]) -> Iterator[str]:
    yield "| | diffusers, s | GiB | ours, s | GiB | ours / diffusers, s | GiB |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for theirs in GUIDE:
        pair = rows.get(theirs), rows.get(theirs._replace(side="ours"))
        cells = [cell for one in pair for cell in ((f"{seconds(one):.3f}", f"{peak(one) / GIB:.3f}") if one else "--")]
        cells += [_ratio(figure, pair[1], pair[0]) for figure in (seconds, peak)]
        yield f"| {', '.join(theirs[1:])} | {' | '.join(cells)} |"


def _table(heading: str, rows: dict[Row, dict], cases: list[tuple], results: dict) -> Iterator[str]:
    columns, compared = FIGURES[heading], RATIOS.get(heading)
    names = [f"{side}, {name}" for side in SIDES for name in columns]
    if compared:
        names += ["ours / diffusers", *(f"{side} of eager" for side in SIDES)]
    yield f"| scheme | memory | compile | {' | '.join(names)} |"
    yield f"|---|---|---|{'---:|' * len(names)}"
    for scheme, memory, compiled in cases:
        pair = [Row(side, scheme, compiled, memory) for side in SIDES]
        cells = []
        for row in pair:
            found = rows.get(row)
            cells += [write(found) for write in columns.values()] if found else _empty(row, results, len(columns))
        if compared:
            theirs, ours = (rows.get(row) for row in pair)
            base = rows.get(EAGER_NF4)
            cells += [_ratio(compared, ours, theirs), _ratio(compared, theirs, base), _ratio(compared, ours, base)]
        yield f"| {scheme} | {memory} | {compiled} | {' | '.join(cells)} |"


def _empty(row: Row, results: dict, columns: int) -> list[str]:
    """Cells of a row that has no figures: the reason, where it is known before it runs, or that there is one below."""
    why = why_not(row, results["settings"]["device"])
    if not why and (found := results["rows"].get(str(row))):
        why = "refused, see below" if found["refused"] else "failed, see below"
    return [why or "-", *["-"] * (columns - 1)]


def _ratio(figure: Callable[[dict], float], part: dict | None, whole: dict | None) -> str:
    return f"{figure(part) / figure(whole):.3f}" if part and whole else "-"
