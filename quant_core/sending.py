"""Results on their way from a GPU, while Python goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIMIT = 2**28  # bytes of RAM that are locked for it at most


def send(*tensors: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Begin to copy tensors of one device to the CPU; what is returned waits until they are there, and gives them.

    Of a GPU nothing is waited for until then, not even that it has computed them.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    locked = _locked(tensors) if tensors[0].device.type == "cuda" and size <= _LIMIT else None
    if locked is None:
        there = [tensor.cpu() for tensor in tensors]
        return lambda: there
    for place, tensor in zip(locked, tensors, strict=True):
        place.copy_(tensor, non_blocking=True)
    done = torch.cuda.current_stream(tensors[0].device).record_event()

    def receive() -> list[torch.Tensor]:
        done.synchronize()
        return [place.clone() for place in locked]  # none of the locked memory stays in a host's cache

    return receive


def _locked(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor] | None:
    """Places for them that a GPU can copy to while it computes, if so much RAM may be locked."""
    try:
        return [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
    except RuntimeError:
        return None
