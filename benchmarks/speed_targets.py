"""What the speed table is to show, as ratios to the eager nf4 row of diffusers' guide."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from speed_rows import EAGER_NF4, SHARE, Row

LATENCY, MEMORY = 0.79, 0.82  # of the eager row's seconds and bytes, both in one row of ours
FASTEST = 0.5  # of the eager row's seconds
BUDGET = 1.15  # of the seconds that the same takes when all of it stays


class Verdict(NamedTuple):
    """A target with what was found; `met` is None where the rows that were asked for do not tell."""

    text: str
    met: bool | None


def seconds(found: dict[str, Any]) -> float:
    """Of an image but the first."""
    return statistics.median(found["seconds"])


def peak(found: dict[str, Any]) -> int:
    """The most bytes that an image but the first takes, weights included."""
    return found["peak"]["later"]["allocated"]


def measured(results: dict[str, Any]) -> dict[Row, dict[str, Any]]:
    """The rows that have figures."""
    rows = {Row(*name.split(", ")): found for name, found in results["rows"].items()}
    return {row: found for row, found in rows.items() if "seconds" in found}


def failures(results: dict[str, Any]) -> Iterator[str]:
    """Rows of ours that ended with an error that is no refusal of ours, or ran without what was asked for."""
    for name, found in results["rows"].items():
        if name.startswith("ours") and "error" in found and not found["refused"]:
            yield f"{name} failed: {found['error']}"
        if eager := found.get("reports", {}).get("compile", {}).get("eager"):
            yield f"{name} was not compiled: {eager}"


def verdicts(results: dict[str, Any], wanted: list[Row]) -> list[Verdict]:
    """Each target, by the rows that were asked for."""
    rows = measured(results)
    ours = [row for row in wanted if row.side == "ours"]
    compiled = [row for row in ours if row.compile != "eager"]
    pairs = [(row, row._replace(memory="resident")) for row in ours if row.memory == "budget" and row.scheme == "nf4"]
    pairs = [pair for pair in pairs if pair[1] in wanted]
    base = rows.get(EAGER_NF4)
    asked = EAGER_NF4 in wanted
    return [
        _both(rows, base, [row for row in compiled if row.scheme == "nf4"] if asked else []),
        _fastest(rows, base, compiled if asked else []),
        _budget(rows, pairs),
    ]


def _both(rows: dict, base: dict | None, candidates: list[Row]) -> Verdict:
    title = f"nf4 of ours, one row: at most {LATENCY} of the seconds and {MEMORY} of the memory of {EAGER_NF4}"
    ratios = {
        row: (seconds(rows[row]) / seconds(base), peak(rows[row]) / peak(base))
        for row in candidates
        if base and row in rows
    }
    if not ratios:
        return _without(title, candidates)
    row = min(ratios, key=lambda row: max(ratios[row][0] / LATENCY, ratios[row][1] / MEMORY))
    time, memory = ratios[row]
    return Verdict(f"{title}: {time:.3f} and {memory:.3f} ({row})", time <= LATENCY and memory <= MEMORY)


def _fastest(rows: dict, base: dict | None, candidates: list[Row]) -> Verdict:
    title = f"the fastest of ours: at most {FASTEST} of the seconds of {EAGER_NF4}"
    ratios = {row: seconds(rows[row]) / seconds(base) for row in candidates if base and row in rows}
    if not ratios:
        return _without(title, candidates)
    row = min(ratios, key=ratios.__getitem__)
    return Verdict(f"{title}: {ratios[row]:.3f} ({row})", ratios[row] <= FASTEST)


def _budget(rows: dict, pairs: list[tuple[Row, Row]]) -> Verdict:
    title = (
        f"nf4 of ours with {SHARE:.0%} of the transformer on the device: at most {BUDGET} of the seconds of all of it"
    )
    ratios = {
        budget: seconds(rows[budget]) / seconds(rows[whole])
        for budget, whole in pairs
        if budget in rows and whole in rows
    }
    if not ratios:
        return _without(title, pairs)
    row = max(ratios, key=ratios.__getitem__)
    return Verdict(f"{title}: {ratios[row]:.3f} at worst ({row})", ratios[row] <= BUDGET)


def _without(title: str, candidates: list) -> Verdict:
    if candidates:
        return Verdict(f"{title}: no figures", False)
    return Verdict(f"{title}: its rows are not among those asked for", None)
