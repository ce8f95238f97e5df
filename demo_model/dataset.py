"""A fixed set of painted scenes, kept as 8-bit images in memory."""

import torch

from .painter import draw_jitter, object_coverage, paint
from .scenes import Scenes, sample_scenes

CHUNK = 64
EVALUATION_SEED = 1_000_003
"""Seed of the paintings that no training stage sees."""


class Paintings:
    """`count` painted scenes of `size` pixels a side; the same seed paints the same scenes on every device."""

    def __init__(self, count: int, size: int, seed: int, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(seed)
        count = -(-count // CHUNK) * CHUNK
        self.count, self.size = count, size
        self.scenes = {name: values.to(device) for name, values in sample_scenes(count, generator).items()}
        self.jitter = draw_jitter(count, generator).to(device)
        self.pixels = torch.empty(count, 3, size, size, dtype=torch.uint8, device=device)
        brush = torch.compile(paint, dynamic=False) if count >= 100 * CHUNK else paint
        for chunk in self.chunks():
            image = brush(self.select(chunk), self.jitter[chunk], size)
            self.pixels[chunk] = (image * 127.5 + 127.5).round().to(torch.uint8)

    def chunks(self) -> list[slice]:
        """Cut the set into slices of CHUNK scenes."""
        return [slice(start, start + CHUNK) for start in range(0, self.count, CHUNK)]

    def select(self, index: torch.Tensor | slice) -> Scenes:
        """Return the attributes of the indexed scenes."""
        return {name: values[index] for name, values in self.scenes.items()}

    def images(self, index: torch.Tensor | slice) -> torch.Tensor:
        """Return the indexed paintings as float images [n, 3, size, size] in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1

    def coverage(self, cell: int) -> torch.Tensor:
        """Return how much of each cell of `cell` pixels objects cover, [count, size // cell, size // cell]."""
        measure = torch.compile(object_coverage, dynamic=False) if self.count >= 100 * CHUNK else object_coverage
        parts = [measure(self.select(chunk), self.jitter[chunk], self.size, cell) for chunk in self.chunks()]
        return torch.cat(parts)
