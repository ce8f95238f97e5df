"""A comparison as text: a table, JSON, CSV."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict
from typing import Any

from .comparison import ComparedPlan, Comparison
from .errors import gib
from .table import aligned

LPIPS_NOTE = "LPIPS is left out: no installable package brings the weights of its network"


def format_comparison(comparison: Comparison) -> str:
    """The plans as an aligned table, with what it was measured on below."""
    head = ("plan", "stored", "of 16 bit", "PSNR dB", "worst", "SSIM", "latents", "s/step", "peak", "load s")
    lines = aligned([head, *map(_row, comparison.plans)], right=range(1, len(head)))
    count = len(comparison.prompts) * len(comparison.seeds)
    lines.append(
        f"{count} pictures, {len(comparison.prompts)} prompts x {len(comparison.seeds)} seeds; "
        "the reference, run twice, is equal to itself."
    )
    lines += [f"{plan.label}: {plan.plan}" for plan in comparison.plans if plan.label.startswith("plan ")]
    lines.append(f"latents: relative error after the last step. {LPIPS_NOTE}.")
    return "\n".join([*lines, *comparison.notices])


def _row(plan: ComparedPlan) -> tuple[str, ...]:
    return (
        plan.label,
        gib(plan.footprint),
        f"{plan.footprint / plan.bytes_16bit:.1%}",
        decibels(plan.psnr),
        decibels(min(plan.psnr_each)),
        f"{plan.ssim:.4f}",
        f"{plan.latent_errors[-1]:.2%}" if plan.latent_errors else "-",
        f"{plan.seconds_per_step:.3g}" if not math.isnan(plan.seconds_per_step) else "-",
        gib(plan.peak) if plan.peak is not None else "-",
        f"{plan.load_seconds:.1f}",
    )


def decibels(value: float) -> str:
    """A PSNR to read."""
    return "equal" if math.isinf(value) else f"{value:.1f}"


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data for JSON, where an infinite PSNR is null with `equal` true."""
    plans = [_plain(asdict(plan) | {"equal": math.isinf(plan.psnr)}) for plan in comparison.plans]
    return {
        "prompts": list(comparison.prompts),
        "seeds": list(comparison.seeds),
        "reference_equals_itself": True,
        "plans": plans,
        "note": LPIPS_NOTE,
        "notices": list(comparison.notices),
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def comparison_csv(comparison: Comparison) -> str:
    """A line per plan and picture, for spreadsheets."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("plan", "text", "footprint", "prompt", "seed", "psnr", "ssim"))
    pictures = [(prompt, seed) for prompt in comparison.prompts for seed in comparison.seeds]
    for plan in comparison.plans:
        for (prompt, seed), psnr, ssim in zip(pictures, plan.psnr_each, plan.ssim_each, strict=True):
            writer.writerow((plan.label, plan.plan, plan.footprint, prompt, seed, psnr, ssim))
    return out.getvalue()
