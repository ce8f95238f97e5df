"""What to say of memory: before a load, and of a pipeline that is loaded beside what it was measured to take."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass

from .errors import dispensable, gib
from .estimate import estimate, needs
from .fitting import what_fits
from .inspection import footprint
from .loading import LoadRequest
from .locating import find_folder
from .pipeline import QuantizedPipeline
from .request import TYPICAL_PROMPT, GenerateRequest
from .source import read_index


def forecast(load: LoadRequest, budget: int | None = None) -> str:
    """One or two sentences: what a pipeline will take at its own default size, and, of what does not fit into a
    budget of bytes, what would. Empty where it cannot be told, as of a pipeline that makes no picture of a prompt, or
    of one that will not load either.
    """
    text = ""
    with dispensable("forecast"):
        text = _forecast(load, budget)
    return text


def _forecast(load: LoadRequest, budget: int | None) -> str:
    folder = find_folder(
        str(load.source), allow_download=load.allow_download, revision=load.revision, variant=load.variant
    )
    if not _takes_prompt(read_index(folder).cls):
        return ""
    request = GenerateRequest(TYPICAL_PROMPT)
    found = estimate(load, request)
    size = " at {} x {}".format(*found.image) if found.image else ""
    text = f"It needs {gib(found.peak_resident)}{size} with all components on the device, {gib(found.peak_in_turn)} "
    text += f"with only the one in use, {gib(found.peak_streamed)} with that one streamed."
    if budget is not None and found.peak_streamed > budget:
        text += f" {what_fits(found, load, request, budget)}"
    return text


def _takes_prompt(pipeline: type) -> bool:
    return "prompt" in inspect.signature(pipeline.__call__).parameters


@dataclass(frozen=True)
class PeakReport:
    """What a run takes, in bytes: estimated for the last request, or the pipeline's default, and as measured."""

    width: int | None  # of the request, in pixels; None is the pipeline's own
    height: int | None
    resident: int  # estimated with all components on the device
    in_turn: int  # estimated with only the component in use on it
    streamed: int | None  # estimated with that one streamed, of a pipeline that a host manages
    measured: int | None  # of the last run, where there was one and it could be measured
    measured_meaning: str = ""  # what that counts, which on a CPU is more in a first run than in later ones

    def __str__(self) -> str:
        size = f"{self.width} x {self.height}" if self.width and self.height else "its default size"
        text = (
            f"peak at {size}: estimated {gib(self.resident)} with all components on the device, {gib(self.in_turn)} "
        )
        text += "with only the one in use"
        if self.streamed is not None:
            text += f", {gib(self.streamed)} with that one streamed"
        if self.measured is not None:
            text += f"; the last run took {gib(self.measured)} ({self.measured_meaning})"
        return text


def peak_report(pipeline: QuantizedPipeline) -> PeakReport | None:
    """The estimate for a loaded pipeline next to what its last run was measured to take; None where it cannot be
    told, as of a pipeline that makes no picture of a prompt and has not run."""
    report = None
    if pipeline.last is not None or _takes_prompt(type(pipeline.pipe)):
        with dispensable("estimate"):
            report = _peak_report(pipeline)
    return report


def _peak_report(pipeline: QuantizedPipeline) -> PeakReport:
    request = pipeline.last or GenerateRequest(TYPICAL_PROMPT)
    used = needs(pipeline, request)
    stored = {name: footprint(module) for name, module in pipeline.models.items()}
    in_turn = max((size + used[name] for name, size in stored.items()), default=0)
    resident = sum(stored.values()) + max(used.values(), default=0)
    least = {name: placement.least for name, placement in pipeline.placements.items()}
    streamed = max((size + used[name] for name, size in least.items()), default=None)
    return PeakReport(request.width, request.height, resident, in_turn, streamed, pipeline.peak, pipeline.peak_meaning)


def peak_data(report: PeakReport) -> dict[str, int | str | None]:
    """The report as plain data for JSON."""
    return asdict(report)
