"""A batch of images under the brush: antialiased shapes from signed distances, vectorised over the batch.

Positions and sizes are fractions of the image side, x to the right and y downwards. Shapes are signed
distances (negative inside), so that edges are antialiased at any resolution.
"""

import torch

from .scenes import Scenes

LIGHT = [(0.95, 0.86, 0.90), (1.0, 1.0, 1.0), (0.96, 0.74, 0.62), (0.50, 0.55, 0.76)]
"""The colour of the light at each time of day."""


def least(*distances: torch.Tensor) -> torch.Tensor:
    """Unite shapes given by signed distances."""
    total = distances[0]
    for distance in distances[1:]:
        total = torch.minimum(total, distance)
    return total


def most(*distances: torch.Tensor) -> torch.Tensor:
    """Intersect shapes given by signed distances."""
    total = distances[0]
    for distance in distances[1:]:
        total = torch.maximum(total, distance)
    return total


class Canvas:
    """A batch of images [batch, 3, size, size] in [0, 1] under the brush, with the layout's random numbers."""

    def __init__(self, scenes: Scenes, jitter: torch.Tensor, size: int) -> None:
        line = (torch.arange(size, device=jitter.device) + 0.5) / size
        self.y, self.x = (axis[None] for axis in torch.meshgrid(line, line, indexing="ij"))
        self.scenes, self.jitter, self.edge, self.drawn = scenes, jitter, 1.2 / size, 0
        self.light = self.palette(LIGHT, scenes["time"])
        self.image = torch.zeros(len(jitter), 3, size, size, device=jitter.device)

    def uniform(self, low: float, high: float) -> torch.Tensor:
        """Take the next random number of each scene, scaled to [low, high), as [batch, 1, 1]."""
        value = self.jitter[:, self.drawn, None, None]
        self.drawn += 1
        return low + (high - low) * value

    def palette(self, table: list, index: torch.Tensor) -> torch.Tensor:
        """Look up one colour per scene, [batch, 3, 1, 1]."""
        return torch.tensor(table, device=index.device, dtype=torch.float32)[index][:, :, None, None]

    def colour(self, *rgb: float) -> torch.Tensor:
        """Make one colour for all scenes, [1, 3, 1, 1]."""
        return torch.tensor(rgb, device=self.image.device)[None, :, None, None]

    def away_from(self, x: torch.Tensor, low: float, high: float, gap: float) -> torch.Tensor:
        """Draw a place in [low, high) that keeps `gap` times the range between itself and `x`."""
        return low + (high - low) * torch.frac((x - low) / (high - low) + self.uniform(gap, 1 - gap) + 1)

    def cover(self, distance: torch.Tensor) -> torch.Tensor:
        """Turn a signed distance into antialiased coverage in [0, 1]."""
        return torch.clamp(0.5 - distance / self.edge, 0, 1)

    def fill(self, rgb: torch.Tensor, distance: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Paint a shape in the scenes [batch] where it exists."""
        self.blend(rgb, self.cover(distance), where)

    def blend(self, rgb: torch.Tensor, alpha: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Paint with opacity `alpha` [batch, size, size] in the scenes [batch] where it exists."""
        if where is not None:
            alpha = alpha * where.float()[:, None, None]
        self.image = self.image + (rgb - self.image) * alpha[:, None]
