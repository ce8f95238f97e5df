"""The targets of quality.py."""

from __future__ import annotations

import math
from collections.abc import Iterator

from quality_report import Figures

from quant_core import get_backend, parse_plan
from quant_core.comparison import REFERENCE

EIGHT_BITS = 8.0  # bits per weight from which on a scheme has to meet the next two targets
FLOOR = 30.0  # dB of PSNR, the least of a scheme of 8 bits or more
GAIN = 3.0  # dB by which nf4 with the layers left out that it leaves out by default beats nf4 everywhere
DEFAULT, EVERYWHERE = "bitsandbytes_4bit/nf4", "bitsandbytes_4bit/nf4?skip=none"
AUTOMATIC = "auto"  # what the labels of automatic plans begin with


def check(found: dict[str, Figures]) -> Iterator[str]:
    """The targets that are missed; those whose plans were not run are none."""
    if not math.isinf(found[REFERENCE].psnr):
        yield f"16 bit is {found[REFERENCE].psnr:.1f} dB from itself, and should be equal"
    yield from check_eight_bits(found)
    yield from check_default(found)
    yield from check_automatic(found)


def check_eight_bits(found: dict[str, Figures]) -> Iterator[str]:
    """A scheme of 8 bits is as near to 16 bit as that, and follows prompts as 16 bit does."""
    for label, row in found.items():
        spec = parse_plan(row.plan).default
        if spec is None or get_backend(spec.backend).scheme(spec.scheme).bits < EIGHT_BITS:
            continue
        if row.psnr < FLOOR:
            yield f"{label}: PSNR is {row.psnr:.1f} dB, at least {FLOOR:g}"
        low, high = row.lost_interval
        if low > 0:
            yield f"{label}: {low:.1f} to {high:.1f}% of adherence are lost, and 0 is not among these"


def check_default(found: dict[str, Figures]) -> Iterator[str]:
    """What a scheme leaves out by default is worth it."""
    if {DEFAULT, EVERYWHERE} <= found.keys():
        gain = found[DEFAULT].psnr - found[EVERYWHERE].psnr
        if gain < GAIN:
            yield f"{DEFAULT} is {gain:+.1f} dB from {EVERYWHERE}, at least {GAIN:+g}"


def check_automatic(found: dict[str, Figures]) -> Iterator[str]:
    """No other plan beats an automatic one in both bytes and PSNR."""
    others = [row for row in found.values() if not row.label.startswith(AUTOMATIC)]
    for row in found.values():
        if row.label.startswith(AUTOMATIC):
            better = [other for other in others if other.footprint <= row.footprint and other.psnr > row.psnr]
            yield from (
                f"{row.label}: {other.label} is no larger and {other.psnr - row.psnr:.1f} dB better"
                for other in better
            )
