"""The least that a host does for a pipeline's memory: components come and go on a device, one of them by a budget."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from quant_core import Placement, QuantizedPipeline


def manage(pipeline: QuantizedPipeline, device: torch.device, memory: str, share: float) -> None:
    """Run the pipeline's components on a device.

    `memory` is `resident` (all of them are there to stay, from now on), `offloaded` (one at a time, whole) or
    `budget` (one at a time, of the transformer no more than that share of its bytes).
    """
    placements, home = pipeline.placements, torch.device("cpu")
    limit = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8 if device.type == "cuda" else 0
    for name, module in pipeline.models.items():
        placements[name] = Placement(module, device, home, name=name, pin_limit=limit)

    def prepare(name: str) -> None:
        placement = placements[name]
        if memory != "resident":
            make_room(other for other in placements.values() if other is not placement)
        placement.load(placement.size * (share if memory == "budget" and name == "transformer" else 1))

    def make_room(others: Iterable[Placement]) -> None:
        there = [other for other in others if other.resident]
        for other in there:
            other.evict()
        if there and device.type == "cuda":
            torch.cuda.empty_cache()  # as ComfyUI and diffusers do

    pipeline.on_use(device, prepare)
    if memory == "resident":
        for name in placements:
            prepare(name)
