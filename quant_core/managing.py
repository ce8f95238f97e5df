"""A pipeline that shares a device among its components by itself, where there is no host to do so."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

import torch

from .errors import SpecError, dispensable
from .estimate import needs
from .pipeline import QuantizedPipeline
from .placement import Placement

_SPARE = 2**28  # bytes left to what libraries take beside
_HOME = torch.device("cpu")

Room = Callable[[str], float]  # bytes that a component's weights may take, by its name


def manage(
    pipeline: QuantizedPipeline,
    device: torch.device,
    room: Room | None = None,
    keep: bool = False,
    copy: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
) -> None:
    """Let components come to a device when they are used, as far as there is room, and stream the rest of them.

    `room` is by default what is free there, less what the component needs to compute. The one that comes takes the
    place of the others, unless it is known to fit in whole beside them, or they are to `keep` it. `copy` is the
    `Placement`'s.

    Raises:
        SpecError: it is managed already.

    A run raises QuantError where a component does not fit and cannot be streamed.
    """
    if pipeline.placements:
        raise SpecError("The pipeline's memory is managed already; load it anew to manage it otherwise.")
    limit = _free_ram() // 8 if device.type == "cuda" else 0
    for name, module in pipeline.models.items():
        pipeline.placements[name] = Placement(module, device, _HOME, copy, name=name, pin_limit=limit)
    manager = _Manager(pipeline, device, room, keep)
    pipeline.begin = manager.begin
    pipeline.on_use(device, manager.prepare)
    if device.type == "cuda":
        pipeline.room = torch.cuda.mem_get_info(device)[0] - _SPARE


def on_device(pipeline: QuantizedPipeline, device: str) -> QuantizedPipeline:
    """The pipeline, whose components come to a device when they are used; they are on the CPU as it is. PyTorch's
    `to` wants room for all at once, and packs some formats anew."""
    if device != "cpu":
        manage(pipeline, torch.device(device))
    return pipeline


class _Manager:
    """Does not hold the pipeline, which holds it."""

    def __init__(self, pipeline, device, room, keep):
        self.pipeline = weakref.ref(pipeline)
        self.placements = pipeline.placements
        self.activations = pipeline.activations
        self.device = device
        self.given = room
        self.keep = keep

    def begin(self, request):
        self.activations.clear()
        if self.device.type == "cuda" and self.given is None:
            with dispensable("estimate of the room that this run needs"):
                self.activations.update(needs(self.pipeline(), request))

    def prepare(self, name):
        placement = self.placements[name]
        keep = self.keep or self._fits_beside(name)
        there = [] if keep else [one for one in self.placements.values() if one is not placement and one.resident]
        for other in there:
            other.evict()
        for other in self.placements.values() if keep else ():
            if other is not placement:
                other.settle()  # of blocks that were fetched ahead
        if there and self.device.type == "cuda":
            torch.cuda.empty_cache()
        if there or not placement.resident or placement.streams:
            placement.load(self.given(name) if self.given else self._free(name))

    def _fits_beside(self, name):
        known = self.device.type == "cuda" and self.given is None and name in self.activations
        return known and self.placements[name].size <= self._free(name)

    def _free(self, name):
        if self.device.type != "cuda":
            return float("inf")
        free, _ = torch.cuda.mem_get_info(self.device)
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return free + kept + self.placements[name].resident - self.activations.get(name, 0) - _SPARE


def _free_ram():
    """Bytes of RAM that nobody uses, where the system says so."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
