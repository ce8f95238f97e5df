"""What would fit into a memory budget, found by trying."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from .errors import QuantError, gib
from .estimate import Estimate, estimate
from .loading import LoadRequest
from .notation import parse_plan
from .request import GenerateRequest

_SHARES = (1 / 4, 3 / 8, 1 / 2, 3 / 4)  # of width and height, from the one that is looked at the fastest
_PLANS = ("torchao/int8wo", "bitsandbytes_4bit/nf4")
_STEP = 64  # pixels; what most pipelines take multiples of


class _Other(NamedTuple):
    """Something else to ask for, and the bytes that it takes with the component in use streamed."""

    words: str
    peak: int

    def __str__(self) -> str:
        return f"{self.words} ({gib(self.peak)})"


def what_fits(found: Estimate, load: LoadRequest, request: GenerateRequest, budget: int) -> str:
    """One sentence: whether an estimated plan fits into a budget of bytes, and if not, the least that it needs, and
    what of a few others would fit or comes nearest.
    """
    if found.peak_resident <= budget:
        return f"It fits into {gib(budget)} with all components on the device."
    if found.peak_in_turn <= budget:
        return f"It fits into {gib(budget)} with only the component in use on the device."
    if found.peak_streamed <= budget:
        return f"It fits into {gib(budget)} with only the component in use on the device, streamed block by block."
    needs = (
        f"It does not fit into {gib(budget)}: it needs at least {gib(found.peak_streamed)}, streamed block by block"
    )
    others = [
        _tiled(load, request, budget),
        _smaller_size(found, load, request, budget),
        _smaller_plan(found, load, request, budget),
    ]
    others = [other for other in others if other is not None and other.peak < found.peak_streamed]
    if fitting := [str(other) for other in others if other.peak <= budget]:
        return f"{needs}; what would fit: {' or '.join(fitting)}."
    if others:
        return f"{needs}, and nothing that was tried fits; nearest comes {min(others, key=lambda other: other.peak)}."
    return f"{needs}, and neither a smaller size nor another plan would fit."


def _tiled(load: LoadRequest, request: GenerateRequest, budget: int) -> _Other | None:
    """What is asked for with its decode in tiles, where it fits so."""
    peak = _peak(load, request, tiled=True)
    if peak is None or peak > budget:
        return None
    return _Other("this plan at this size with its decode in tiles, as ComfyUI then runs it", peak)


def _smaller_size(found: Estimate, load: LoadRequest, request: GenerateRequest, budget: int) -> _Other | None:
    """The largest of a few sizes that fits, or else the smallest."""
    own = found.image or (request.width or 1024, request.height or 1024)
    best = None
    for size in dict.fromkeys(tuple(_shrunk(side, share) for side in own) for share in _SHARES):
        peak = _peak(load, replace(request, width=size[0], height=size[1])) if size != own else None
        if peak is None:
            continue
        other = _Other("this plan at {} x {}".format(*size), peak)
        if peak > budget:  # and so is that of the sizes to come
            return best or other
        best = other
    return best


def _shrunk(side: int, share: float) -> int:
    return max(int(side * share) // _STEP * _STEP, min(_STEP, side))


def _smaller_plan(found: Estimate, load: LoadRequest, request: GenerateRequest, budget: int) -> _Other | None:
    """The first of a few plans that fits, or else the one that takes the least."""
    if any(part.activations > budget and not part.quantization for part in found.components):
        return None  # to quantize a component takes nothing off what it computes
    others = []
    for text in _PLANS:
        peak = _peak(replace(load, plan=parse_plan(text)), request)
        if peak is not None:
            others.append(_Other(f"{text} at this size", peak))
            if peak <= budget:
                return others[-1]
    return min(others, key=lambda other: other.peak, default=None)


def _peak(load: LoadRequest, request: GenerateRequest, **further: bool) -> int | None:
    """Bytes with the component in use streamed, None of what cannot be had."""
    try:
        return estimate(load, request, **further).peak_streamed
    except QuantError:
        return None
