"""What would fit into a memory budget, found by trying."""

from __future__ import annotations

from dataclasses import replace

from .errors import QuantError, gib
from .estimate import Estimate, estimate
from .generation import GenerateRequest
from .loading import LoadRequest
from .notation import parse_plan

_SHARES = (3 / 4, 1 / 2, 3 / 8, 1 / 4)  # of width and height
_PLANS = ("torchao/int8wo", "bitsandbytes_4bit/nf4")
_STEP = 64  # pixels; what most pipelines take multiples of


def what_fits(found: Estimate, load: LoadRequest, request: GenerateRequest, budget: int) -> str:
    """One sentence: whether an estimated plan fits into a budget of bytes, and if not, what of a few others would."""
    if found.peak_resident <= budget:
        return f"It fits into {gib(budget)} with all components on the device."
    if found.peak_in_turn <= budget:
        return f"It fits into {gib(budget)} with only the component in use on the device."
    if found.peak_streamed <= budget:
        return f"It fits into {gib(budget)} with only the component in use on the device, streamed block by block."
    needs = f"It does not fit into {gib(budget)}: it needs {gib(found.peak_streamed)}"
    others = [*filter(None, [_smaller_size(found, load, request, budget), _smaller_plan(load, request, budget)])]
    if not others:
        return f"{needs}, and neither a quarter of the size nor {_PLANS[-1]} would fit."
    return f"{needs}; what would fit: {' or '.join(others)}."


def _smaller_size(found: Estimate, load: LoadRequest, request: GenerateRequest, budget: int) -> str:
    width, height = found.image or (request.width or 1024, request.height or 1024)
    for share in _SHARES:
        size = [max(int(side * share) // _STEP * _STEP, _STEP) for side in (width, height)]
        peak = _peak(load, replace(request, width=size[0], height=size[1]))
        if size != [width, height] and peak is not None and peak <= budget:
            return f"this plan at {size[0]} x {size[1]} ({gib(peak)})"
    return ""


def _smaller_plan(load: LoadRequest, request: GenerateRequest, budget: int) -> str:
    for text in _PLANS:
        peak = _peak(replace(load, plan=parse_plan(text)), request)
        if peak is not None and peak <= budget:
            return f"{text} at this size ({gib(peak)})"
    return ""


def _peak(load: LoadRequest, request: GenerateRequest) -> int | None:
    """Bytes with the component in use streamed, None of what cannot be had."""
    try:
        return estimate(load, request).peak_streamed
    except QuantError:
        return None
