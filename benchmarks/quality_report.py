"""What the results of quality.py say: figures with intervals, tables, the README's summary and chart.

All is made from the results alone, the JSON beside the table, which has a record per plan and prompt.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from intervals import RESAMPLES, decibels, interval, mean, share
from PIL.PngImagePlugin import PngInfo

from quant_core.comparison import REFERENCE
from quant_core.comparison_chart import Point, draw_chart
from quant_core.comparison_report import LPIPS_NOTE

MIB = 2**20
SIZE = (1000, 720)  # pixels of the chart
SUMMARY = (  # what the README shows
    REFERENCE,
    "auto 18 MiB",
    "gguf/Q8_0",
    "torchao/int8wo",
    "bitsandbytes_8bit/int8",
    "torchao/fp8wo",
    "auto 14 MiB",
    "gguf/Q5_1?skip=none",
    "bitsandbytes_4bit/nf4",
    "bitsandbytes_4bit/nf4?skip=none",
    "gguf/Q4_0?skip=none",
    "quanto/int4?skip=none",
)

Interval = tuple[float, float]


class Figures(NamedTuple):
    """Of one plan. Adherence is in percent; of it is `lost` what 16 bit has more, prompt by prompt."""

    label: str
    plan: str  # as text
    footprint: int  # bytes
    of_16bit: float
    psnr: float  # dB, the mean over pictures, infinite if all are equal
    psnr_interval: Interval
    psnr_together: float  # dB, of the errors of all pictures together
    ssim: float
    ssim_interval: Interval
    adherence: float
    adherence_interval: Interval
    lost: float
    lost_interval: Interval
    latent_errors: tuple[float, ...]  # relative, after each step
    seconds_per_step: float
    peak: int | None  # bytes


def figures(results: dict[str, Any]) -> dict[str, Figures]:
    """The plans by label, the smallest first."""
    asked = torch.tensor(results["asked"])
    reference = torch.tensor(results["plans"][REFERENCE]["right"])
    found = [_figures(label, row, asked, reference) for label, row in results["plans"].items()]
    return {row.label: row for row in sorted(found, key=lambda row: (row.footprint, row.psnr))}


def _figures(label: str, row: dict[str, Any], asked: torch.Tensor, reference: torch.Tensor) -> Figures:
    each, errors, alike, right = (torch.tensor(row[key]) for key in ("psnr", "mse", "ssim", "right"))
    lost = reference - right

    def percent(counts: torch.Tensor) -> tuple[float, Interval]:
        low, high = interval(share, counts, asked)
        return 100 * share(counts, asked).item(), (100 * low, 100 * high)

    return Figures(
        label,
        row["plan"],
        row["footprint"],
        row["footprint"] / row["bytes_16bit"],
        each.double().mean().item() if any(row["mse"]) else math.inf,
        interval(mean, each) if any(row["mse"]) else (math.inf, math.inf),
        decibels(errors.double()).item(),
        alike.double().mean().item(),
        interval(mean, alike),
        *percent(right),
        *percent(lost),
        tuple(row["latent_errors"]),
        row["seconds_per_step"],
        row["peak"],
    )


def report(results: dict[str, Any], missed: list[str]) -> str:
    """The page, as Markdown."""
    settings = results["settings"]
    dates = sorted({row["date"] for row in results["plans"].values()})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    lines = [
        "# What a plan costs in quality: the demo model",
        "",
        f"`{command(settings)}`, {when}, on {settings['device']}: {settings['machine']}.",
        "",
        f"{pictures(settings)} of {settings['size']} x {settings['size']} pixels in {settings['steps']} steps, with a "
        f"true_cfg_scale of {settings['guidance']:g}, from the same noise with every plan. A plan is for the denoiser "
        "and the text encoders. The 16-bit pictures, made twice, are equal bit for bit; PSNR, SSIM and latents are "
        "distances from them. PSNR is the mean over pictures, each counted as 100 dB at most; `together` is that of "
        "the errors of all pictures, which the few decide that became others. In brackets are 95% intervals: the "
        f"percentile bootstrap over prompts with all their pictures, {RESAMPLES} resamples. Adherence is the share of "
        "the attributes asked for that the demo's judge sees in the pictures; what is lost of it is 16 bit's less the "
        f"plan's, prompt by prompt. Seconds are of a step of a batch of {settings['batch']} pictures, peak is weights "
        f"and growth of the process for such a batch, both as medians. {LPIPS_NOTE}.",
        "",
        *tables(results),
        *(["", "Missed:", "", *(f"- {line}" for line in missed)] if missed else ["", "All targets are met."]),
    ]
    if unable := results["unable"]:
        lines += ["", "Not run here:", "", *(f"- {sentence}" for sentence in unable.values())]
    return "\n".join(lines) + "\n"


def pictures(settings: dict[str, Any]) -> str:
    """How many pictures there are."""
    prompts, seeds = settings["prompts"], settings["seeds"]
    return f"{prompts * seeds} pictures ({prompts} prompts x {seeds} seed{'s' * (seeds > 1)})"


def command(settings: dict[str, Any]) -> str:
    """What makes these results."""
    return f"python benchmarks/quality.py --prompts {settings['prompts']} --seeds {settings['seeds']}"


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Every figure, as lines of Markdown."""
    rows = figures(results).values()
    head = ("plan", "MiB", "of 16 bit", "PSNR dB", "together", "SSIM", "latents, last step %")
    head += ("adherence %", "adherence lost", "s/step", "peak MiB")
    yield from _table(head, [_cells(row) for row in rows])
    yield ""
    yield "Relative error of the latents in percent, after each step:"
    yield ""
    steps = range(results["settings"]["steps"])
    cells = [(row.label, *(f"{100 * row.latent_errors[step]:.2f}" for step in steps)) for row in rows]
    yield from _table(("plan", *(str(step + 1) for step in steps)), cells)


def _cells(row: Figures) -> tuple[str, ...]:
    return (
        row.label,
        f"{row.footprint / MIB:.2f}",
        f"{row.of_16bit:.1%}",
        _decibels(row),
        f"{row.psnr_together:.1f}" if not math.isinf(row.psnr) else "equal",
        _with(row.ssim, row.ssim_interval, ".4f") if row.label != REFERENCE else "1",
        f"{100 * row.latent_errors[-1]:.2f}",
        _with(row.adherence, row.adherence_interval, ".1f"),
        _with(row.lost, row.lost_interval, "+.1f") if row.label != REFERENCE else "-",
        f"{row.seconds_per_step:.3f}",
        f"{row.peak / MIB:.0f}" if row.peak is not None else "-",
    )


def summary(results: dict[str, Any]) -> str:
    """The README's table: of some plans, and of each the figures that matter most."""
    rows = [row for row in figures(results).values() if row.label in SUMMARY]
    head = ("plan", "MiB", "of 16 bit", "PSNR dB", "SSIM", "adherence %", "adherence lost")
    return "\n".join(_table(head, [(*_cells(row)[:4], _cells(row)[5], *_cells(row)[7:9]) for row in rows]))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|---|{'---:|' * (len(head) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _decibels(row: Figures) -> str:
    return "equal" if math.isinf(row.psnr) else _with(row.psnr, row.psnr_interval, ".1f")


def _with(value: float, bounds: Interval, form: str) -> str:
    return f"{value:{form}} ({bounds[0]:{form}} to {bounds[1]:{form}})"


def update_readme(results: dict[str, Any], readme: Path, picture: Path) -> None:
    """Put the summary between the README's marks, and draw the chart, which carries its figures as text."""
    text = readme.read_text(encoding="utf-8")
    block = f"<!-- quality -->\n{readme_block(results)}\n<!-- /quality -->"
    text, count = re.subn(r"<!-- quality -->\n.*?<!-- /quality -->", lambda _: block, text, flags=re.S)
    if count != 1:
        raise SystemExit(
            f"{readme.name} has no <!-- quality --> and <!-- /quality --> in lines of their own; add them."
        )
    readme.write_text(text, encoding="utf-8")
    points = chart_points(results)
    note = PngInfo()
    note.add_text("figures", json.dumps(points))
    bytes_16bit = results["plans"][REFERENCE]["footprint"]
    draw_chart(points, bytes_16bit, SIZE).save(picture, pnginfo=note, optimize=True)


def readme_block(results: dict[str, Any]) -> str:
    """What stands in the README."""
    return f"{summary(results)}\n\n*{pictures(results['settings'])} of the demo model.*"


def chart_points(results: dict[str, Any]) -> list[Point]:
    """What the chart shows: the plans of a backend in one colour."""
    rows = [row for row in figures(results).values() if row.label != REFERENCE]
    return [Point(row.label, row.footprint, round(row.psnr, 2), re.split("[ /]", row.label)[0]) for row in rows]
