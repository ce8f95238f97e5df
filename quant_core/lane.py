"""Copies of weights to a device, to a GPU on a stream of their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from .transfer import adopt, copies

AHEAD = 3  # streamed blocks on the device at once: the one that ended, the one that runs, the next


class Lane:
    """Copies to a device; to a GPU while it computes. `copy` makes them in its place."""

    def __init__(
        self,
        device: torch.device,
        copy: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
        pin_limit: int = 0,
    ):
        self.device = device
        self.pin_left = pin_limit  # bytes that may still be locked
        self._given = copy
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and copy is None else None
        self._events = deque()

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A plain tensor on the device, filled when what computes has come to the next `wait`."""
        if self._given:
            return self._given(tensor, self.device)
        if self._side is None:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._side):
            made = tensor.to(self.device, non_blocking=True)
        made.record_stream(computing)
        return made

    def within(self) -> Callable[[], AbstractContextManager]:
        """What makes the context in which another thread copies for what computes in this one."""
        if self._side is None:
            return nullcontext
        computing = torch.cuda.current_stream(self.device)
        return lambda: torch.cuda.stream(computing)

    def wait(self) -> None:
        """What computes from now on sees what was copied until now."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def used(self) -> None:
        """A streamed block was handed to the GPU."""
        if self._side is not None:
            self._events.append(torch.cuda.current_stream(self.device).record_event())

    def catch_up(self) -> None:
        """Do not run ahead of the GPU: the memory of a block comes back when the GPU is done with it."""
        while len(self._events) > AHEAD - 2:
            self._events.popleft().synchronize()

    def forget(self) -> None:
        """The run is over."""
        self._events.clear()

    def pin(self, modules: list[nn.Module]) -> bool:
        """Lock the modules' weights into memory that a GPU can copy from while it computes; whether that was done."""
        sizes: list[int] = []
        copies(modules, lambda tensor: sizes.append(_locked(tensor)) or tensor, torch.device("cpu"))
        if self._side is None or sum(sizes) > self.pin_left:
            return False
        self.pin_left -= sum(sizes)
        try:
            adopt(copies(modules, lambda tensor: tensor.pin_memory(), torch.device("cpu")))
        except RuntimeError:  # no more may be locked: copied from as it is, only slower
            self.pin_left = 0
            return False
        return True


def _locked(tensor: torch.Tensor) -> int:
    """Bytes that PyTorch locks for a tensor: the next power of two (CachingHostAllocator.h)."""
    return 1 << max(tensor.numel() * tensor.element_size() - 1, 0).bit_length()
