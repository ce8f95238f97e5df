"""Why an automatic plan is the one that it is, in three lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .comparison_report import decibels
from .errors import gib
from .estimate import Estimate
from .knapsack import Choice
from .metrics import psnr_of
from .mixtures import Part, describe
from .notation import format_plan
from .room import FITS, Room
from .specs import QuantPlan, QuantSpec


def reasons(
    room: Room,
    found: Estimate,
    parts: Sequence[Part],
    picked: Mapping[str, Choice],
    rival: tuple[QuantSpec, float] | None,
) -> tuple[str, str, str]:
    """What the plan takes by its estimate, what was picked for each component, and what that is expected to cost
    beside the best uniform plan that fits, which is given with its error."""
    stored, full = (sum(getattr(part, key) for part in found.components) for key in ("footprint", "bytes_16bit"))
    size = (
        f"It takes {gib(room.taken(found))} of {gib(room.budget)} {FITS[room.fits]}; the weights are {gib(stored)}, "
        f"{stored / full:.0%} of 16 bit."
    )
    choice = "; ".join(f"{name}: {describe(way.picks[0])}" for name, way in picked.items()) + "."
    is_plain = not any(way.picks[0].backend for way in picked.values())
    return size, choice, "It is 16 bit, which fits." if is_plain else _cost(parts, picked, rival)


def _cost(parts: Sequence[Part], picked: Mapping[str, Choice], rival: tuple[QuantSpec, float] | None) -> str:
    sources = f"measured on {', '.join(dict.fromkeys(part.expected.source for part in parts))}"
    other = f"{format_plan(QuantPlan(default=rival[0]))}, the best uniform plan that fits" if rival else ""
    if not all(part.expected.is_own for part in parts):
        what = f"Expected nearer to 16 bit than {other}" if rival else "No uniform plan fits"
        return f"{what}; {sources}, another model, so only the order counts."
    psnr = decibels(psnr_of(sum(way.error for way in picked.values())))
    against = f"against {decibels(psnr_of(rival[1]))} dB of {other}" if rival else "and no uniform plan fits"
    return f"Expected PSNR to 16 bit {psnr} dB, {against}; {sources}."
