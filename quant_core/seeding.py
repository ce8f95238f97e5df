"""Random numbers that a pipeline draws without being given a generator: by the seed, and without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_OTHER = 0x9E3779B97F4A7C15  # any number: seeds differ from their like with its bits turned


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let PyTorch's own generators, of the CPU and of a CUDA device, begin where a seed says, and leave them as they
    are.

    Some pipelines, schedulers and models draw from these, or set them to a seed of theirs. What they draw is not what
    a generator of that seed gives, which is the noise that the run starts from.
    """
    generators = [torch.default_generator]
    if device.type == "cuda":
        torch.cuda.init()
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    before = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed ^ _OTHER)
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            generator.set_state(state)
