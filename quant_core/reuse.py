"""diffusers' cache hooks on a denoiser: what they really reuse is counted, and they leave no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(eq=False)
class Reuse:
    """What one run reused, counted while it ran."""

    way: str
    passes: int = 0  # of the denoiser
    reused: int = 0  # passes in which a module was not run
    calls: int = 0  # of the modules that the way reaches, in all passes
    ran: int = 0  # of these calls, those that did their work
    ratios: list[float] = field(default_factory=list)  # of a run that measured them; see step_cache

    def __str__(self) -> str:
        ratios = f", ratios={' '.join(f'{ratio:.4f}' for ratio in self.ratios)}" if self.ratios else ""
        return f"{self.way}: {self.reused} of {self.passes} passes reused{ratios}"

    @property
    def skipped(self) -> float:
        """The share of the calls that were spared."""
        return 1 - self.ran / self.calls if self.calls else 0.0

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {"way": self.way, "passes": self.passes, "reused": self.reused, "skipped": round(self.skipped, 4)}
        return found | ({"ratios": self.ratios} if self.ratios else {})


@contextmanager
def counting(denoiser: nn.Module, reuse: Reuse) -> Iterator[None]:
    """Count the passes of a denoiser whose caching is enabled, and the calls of the modules that it reaches."""
    for hook in reached(denoiser):
        record = hook.fn_ref
        record.forward = _counted(record.forward, reuse, "calls")
        record.original_forward = _counted(record.original_forward, reuse, "ran")
    spared = 0

    def begin(module: nn.Module, args: Any) -> None:
        nonlocal spared
        reuse.passes += 1
        spared = reuse.calls - reuse.ran

    def end(module: nn.Module, args: Any, output: Any) -> None:
        reuse.reused += reuse.calls - reuse.ran > spared

    handles = denoiser.register_forward_pre_hook(begin), denoiser.register_forward_hook(end)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def reached(denoiser: nn.Module) -> list[Any]:
    """The hooks that decide whether their module runs."""
    return [hook for part in denoiser.modules() for hook in _hooks(part) if hook.fn_ref.original_forward is not None]


def _hooks(module: nn.Module) -> list[Any]:
    registry = vars(module).get("_diffusers_hook")
    return [] if registry is None else list(registry.hooks.values())


def _counted(function: Any, reuse: Reuse, what: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        setattr(reuse, what, getattr(reuse, what) + 1)
        return function(*args, **kwargs)

    return call
