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
    dtype: str,
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
    return size, choice, "It is 16 bit, which fits." if is_plain else _cost(parts, picked, rival, dtype)


def _cost(
    parts: Sequence[Part], picked: Mapping[str, Choice], rival: tuple[QuantSpec, float] | None, dtype: str
) -> str:
    sources = f"measured on {', '.join(dict.fromkeys(part.expected.source for part in parts))}"
    if guessed := _guessed(parts, picked):
        sources += f", but for {', '.join(guessed)}, told by their noise"
    other = f"{format_plan(QuantPlan(default=rival[0]))}, the best uniform plan that fits" if rival else ""
    if not all(part.expected.is_own for part in parts):
        what = f"Expected nearer to 16 bit than {other}" if rival else "No uniform plan fits"
        return f"{what}; {sources}, another model, so only the order counts."
    psnr = decibels(psnr_of(sum(way.error for way in picked.values())))
    against = f"against {decibels(psnr_of(rival[1]))} dB of {other}" if rival else "and no uniform plan fits"
    beside = "" if all(part.expected.dtype == dtype for part in parts) else f" beside the rounding of {dtype}"
    return f"Expected PSNR to 16 bit {psnr} dB{beside}, {against}; {sources}."


def _guessed(parts: Sequence[Part], picked: Mapping[str, Choice]) -> list[str]:
    """What was picked without having been measured."""
    found = {}
    for part in parts:
        (mixture,) = picked[part.name].picks
        for group, scheme in mixture.schemes.items():
            spec = f"{mixture.backend}/{scheme}"
            if scheme and not part.expected.was_measured(group, spec):
                found[spec] = True
    return sorted(found)
