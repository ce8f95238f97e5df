"""Flux as we load, optimize and manage it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from managed import manage
from speed_rows import COMPILES, SCHEMES, SHARE, Row

from quant_core import GenerateRequest, LoadRequest, QuantizedPipeline, generate, load_pipeline, parse_plan
from quant_core.optimization import optimize, parse_optimization


def load(row: Row, folder: Path, device: torch.device, store: Path) -> QuantizedPipeline:
    """The pipeline of a row, on its device as far as the row says, to be compiled when it first runs."""
    plan = parse_plan(SCHEMES[row.scheme].plan)
    pipeline = load_pipeline(LoadRequest(str(folder), plan, device=device.type, store=store))
    manage(pipeline, device, row.memory, SHARE)
    return optimize(pipeline, parse_optimization(compile=COMPILES[row.compile].ours))


def painter(
    pipeline: QuantizedPipeline, size: int, steps: int, tokens: int
) -> Callable[[int, Callable[[], None]], torch.Tensor]:
    """A function from a seed, and what to call after each step, to images (N, H, W, C) in 0..1 on the CPU.

    Text encoders run for each of them, as diffusers' do.
    """

    def paint(seed: int, on_step: Callable[[], None]) -> torch.Tensor:
        request = GenerateRequest(
            f"a lake at noon, {seed}",
            width=size,
            height=size,
            steps=steps,
            seed=seed,
            max_sequence_length=tokens,
            remember=False,
        )
        return generate(pipeline, request, lambda step: on_step())

    return paint
