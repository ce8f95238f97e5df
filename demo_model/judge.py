"""The judge: a classifier that names the attributes of a picture, to measure how well it follows its caption."""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from .scenes import ATTRIBUTES, Scenes, visible

WIDTHS = (3, 24, 48, 96, 160)
GRID = 4
SIDE = 128


class Judge(nn.Module):
    """A convolutional classifier with one head per attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip(WIDTHS, WIDTHS[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(WIDTHS[-1] * GRID**2, len(values)) for name, values in ATTRIBUTES.items()}
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the logits [batch, values] per attribute of images [batch, 3, height, width] in [-1, 1]."""
        if image.shape[-2:] != (SIDE, SIDE):
            image = F.interpolate(image, size=SIDE, mode="bilinear", antialias=True)
        features = F.adaptive_avg_pool2d(self.body(image), GRID).flatten(1)
        return {name: head(features) for name, head in self.heads.items()}


def load_judge(path: str | Path, device: str = "cpu") -> Judge:
    """Load the judge from its safetensors file, in float32 and ready to score."""
    judge = Judge()
    judge.load_state_dict({name: value.float() for name, value in load_file(str(path)).items()})
    return judge.to(device).eval().requires_grad_(False)


def save_judge(judge: Judge, path: str | Path) -> None:
    """Write the judge's weights in float16."""
    save_file({name: value.half().contiguous() for name, value in judge.state_dict().items()}, str(path))


@torch.no_grad()
def verdicts(judge: Judge, images: torch.Tensor, scenes: Scenes) -> dict[str, torch.Tensor]:
    """Tell per attribute which images [batch, 3, height, width] in [-1, 1] show what `scenes` asks for.

    Each entry holds booleans, only for those images where the attribute can be seen.
    """
    seen = visible(scenes)
    device = next(judge.parameters()).device
    logits = judge(images.float().to(device))
    return {name: (logits[name].argmax(1).cpu() == scenes[name].cpu())[seen[name].cpu()] for name in logits}


def adherence(judge: Judge, images: torch.Tensor, scenes: Scenes) -> dict[str, tuple[float, int]]:
    """Return per attribute the share of images that show what `scenes` asks for, and how many images that is of."""
    return {
        name: (right.float().mean().item() if len(right) else float("nan"), len(right))
        for name, right in verdicts(judge, images, scenes).items()
    }
