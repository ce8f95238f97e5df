"""The plan with the least expected error that fits into a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .errors import SpecError, choices, gib
from .estimate import Estimate, estimate, estimate_data
from .expectation import expectation, usable_specs
from .hollow import hollow_models
from .loading import LoadRequest
from .locating import find_folder
from .metrics import psnr_of
from .mixtures import Part, as_spec, expected_error, mixtures, whole
from .notation import format_plan
from .planning import check_plan
from .reasons import reasons
from .request import GenerateRequest
from .room import FITS, Room
from .sensitivity_data import Sensitivity
from .source import PipelineIndex, read_index
from .specs import QuantPlan, QuantSpec

_ROUNDS = 24  # in each of which it is learned what one more kind of plan computes with


@dataclass(frozen=True)
class AutoPlanRequest:
    """For which pipeline and which run a plan is wanted, and the bytes it may take.

    `load` names the pipeline without a plan. `fits` says what has to fit: `in turn` the component in use with what it
    computes, `together` all components with that, `weights` the stored weights alone. `sensitivity` is data of the
    user's own, in place of those that are shipped.

    Raises:
        SpecError: a setting is none.
    """

    load: LoadRequest
    run: GenerateRequest
    budget: int
    fits: str = "in turn"
    sensitivity: Sensitivity | None = None

    def __post_init__(self):
        if self.fits not in FITS:
            raise SpecError(f"fits is {self.fits!r}; use one of: {choices(FITS)}.")
        if self.budget <= 0:
            raise SpecError(f"The budget is {self.budget} bytes; it takes at least 1.")
        if self.load.plan != QuantPlan():
            raise SpecError("An automatic plan is for a pipeline without one; leave the plan out.")


@dataclass(frozen=True)
class AutoPlan:
    """The plan, what it is estimated to take, and why it is this one."""

    plan: QuantPlan
    estimate: Estimate
    taken: int  # bytes of what has to fit
    expected_error: float  # squared error of pictures in 0..1, 0 for 16 bit
    is_own: bool  # whether all of that was measured on this very model
    reasons: tuple[str, str, str]

    @property
    def footprint(self) -> int:
        """Bytes of all weights as stored."""
        return sum(part.footprint for part in self.estimate.components)


def auto_plan(request: AutoPlanRequest) -> AutoPlan:
    """Find the plan. Nothing is loaded.

    Raises:
        SpecError, SourceError: as `load_pipeline` and `generate` say.
        SpecError: no plan fits, or the pipeline has nothing to quantize.
    """
    load = request.load
    index, dtype, device = _opened(load)
    found = estimate(load, request.run)
    parts = _parts(index, dtype, request.sensitivity)
    specs = usable_specs(load)
    ways = {name: mixtures(part, specs, dtype, device) for name, part in parts.items()}
    room = Room(request.budget, request.fits, found, parts)
    for _ in range(_ROUNDS):
        picked = room.choose(ways)
        mixed = {name: as_spec(parts[name], choice.picks[0], dtype, device) for name, choice in picked.items()}
        plan = QuantPlan({name: spec for name, spec in mixed.items() if spec})
        found = estimate(replace(load, plan=plan), request.run)
        if room.taken(found) <= request.budget:
            error = sum(choice.error for choice in picked.values())
            rival = _rival(request, room, parts, specs, dtype, device) if plan.components else None
            told = reasons(room, found, list(parts.values()), picked, rival, load.dtype)
            is_own = all(part.expected.is_own for part in parts.values())
            return AutoPlan(plan, found, room.taken(found), error, is_own, told)
        if not room.learn(picked, found):
            break
    way = "" if request.fits == "weights" else " or a smaller size"
    raise SpecError(
        f"No plan fits into {gib(request.budget)} {FITS[request.fits]}: the least that was found takes "
        f"{_enough(room.taken(found))}{room.where(found)}; give that much{way}."
    )


def _enough(count: int) -> str:
    """Bytes to read, rounded up."""
    unit = 2**30 if count >= 2**30 else 2**20
    return gib(math.ceil(100 * count / unit) * unit / 100)


def _rival(
    request: AutoPlanRequest,
    room: Room,
    parts: Mapping[str, Part],
    specs: Sequence[QuantSpec],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[QuantSpec, float] | None:
    """The best plan that fits of those that quantize all layers alike, and its expected error."""
    ways = {spec: {name: whole(part, spec, dtype, device) for name, part in parts.items()} for spec in specs}
    errors = {spec: sum(way.error for way in found.values()) for spec, found in ways.items()}
    for spec in sorted(specs, key=lambda spec: errors[spec]):
        if room.has(ways[spec]):
            found = estimate(replace(request.load, plan=QuantPlan(default=spec)), request.run)
            if room.taken(found) <= request.budget:
                return spec, errors[spec]
    return None


def expected_psnr(load: LoadRequest, sensitivity: Sensitivity | None = None) -> float:
    """The mean PSNR in dB to 16 bit that a plan is expected to have, by data as `AutoPlanRequest` has them.

    Raises:
        SpecError, SourceError, BackendUnavailable, DeviceUnsupported: as `load_pipeline` says.
    """
    index, dtype, device = _opened(load)
    specs = check_plan(load.plan, index, dtype, device, load.variant).specs
    parts = _parts(index, dtype, sensitivity)
    return psnr_of(sum(expected_error(parts[name], spec, dtype, device) for name, spec in specs.items()))


def _opened(load: LoadRequest) -> tuple[PipelineIndex, torch.dtype, torch.device]:
    folder = find_folder(
        str(load.source), allow_download=load.allow_download, revision=load.revision, variant=load.variant
    )
    return read_index(folder), getattr(torch, load.dtype), torch.device(load.device)


def _parts(index: PipelineIndex, dtype: torch.dtype, sensitivity: Sensitivity | None) -> dict[str, Part]:
    """The components that can be quantized.

    Raises:
        SpecError: there is none.
    """
    models, parts = hollow_models(index, dtype), {}
    for name in index.default_reach:
        if not index.models[name].prequantized:
            expected = expectation(name, models[name], index, sensitivity)
            parts[name] = Part(name, models[name], expected, expected.groups(models[name]))
    if not parts:
        raise SpecError(f"{index.name} has no component that could be quantized; load it as it is.")
    return parts


def format_auto_plan(found: AutoPlan) -> str:
    """The plan as text, and below it why it is this one."""
    return "\n".join([format_plan(found.plan), *found.reasons])


def auto_plan_data(found: AutoPlan) -> dict[str, Any]:
    """The same as plain data for JSON, with the plan as `QuantPlan.from_dict` and as `parse_plan` read it, and its
    estimate."""
    psnr = psnr_of(found.expected_error)
    return {
        "plan": found.plan.to_dict(),
        "text": format_plan(found.plan),
        "taken": found.taken,
        "footprint": found.footprint,
        "expected_psnr": psnr if found.is_own and math.isfinite(psnr) else None,
        "measured_on_this_model": found.is_own,
        "reasons": list(found.reasons),
        "estimate": estimate_data(found.estimate),
    }
