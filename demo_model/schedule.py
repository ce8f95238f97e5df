"""What the training stages share: a learning rate that follows the clock, weight averaging and a log."""

import copy
import math
import time

import torch
from torch import nn


class Clock:
    """The training time in minutes that a stage has, and how much of it is gone."""

    def __init__(self, minutes: float) -> None:
        self.start, self.seconds = time.time(), 60 * minutes

    @property
    def progress(self) -> float:
        """The share of the time that is gone, 1 at the end."""
        return (time.time() - self.start) / self.seconds

    def log(self, *words: object) -> None:
        """Print words after the minutes gone."""
        print(f"[{(time.time() - self.start) / 60:6.1f} min]", *words, flush=True)


class Average:
    """An exponential moving average of parameters; its window grows with the steps up to 1 / (1 - decay)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the module's present parameters."""
        self.steps += 1
        weight = 1 - min(self.decay, self.steps / (self.steps + 50))
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), weight)


def set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, progress: float) -> None:
    """Set the learning rate: linear warmup over 100 steps, half a cosine down to zero at the end of the time."""
    rate = peak * min((step + 1) / 100, 1) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))
    for group in optimizer.param_groups:
        group["lr"] = rate
