"""A pipeline's memory as the rows of the speed table have it."""

from __future__ import annotations

import torch

from quant_core import QuantizedPipeline
from quant_core.managing import manage as manage_alone


def manage(pipeline: QuantizedPipeline, device: torch.device, memory: str, share: float) -> None:
    """Run the pipeline's components on a device.

    `memory` is `resident` (all of them are there to stay, from now on), `offloaded` (one at a time, whole) or
    `budget` (one at a time, of the transformer no more than that share of its bytes).
    """
    placements = pipeline.placements

    def room(name: str) -> float:
        return placements[name].size * (share if memory == "budget" and name == "transformer" else 1)

    manage_alone(pipeline, device, room, keep=memory == "resident")
    if memory == "resident":
        for name in placements:
            pipeline.prepare(name)
