"""The bytes of tensors that are alive while a model runs on PyTorch's meta device, where they hold nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._prims_common import suggest_memory_format
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from .scratch import scratch

_META, _CPU = torch.device("meta"), torch.device("cpu")
_CONVOLUTION = torch.ops.aten.convolution.default


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: `now`, and at most (`peak`) since `counting` began, as on `device`.

    While it counts, what touches a tensor on the meta device is on it; else all new tensors are on the CPU.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.inside = False
        self.now = self.peak = 0
        self.counted: set[int] = set()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count from nothing, as long as this lasts."""
        self.inside, self.now, self.peak, self.counted = True, 0, 0, set()
        try:
            yield
        finally:
            self.inside = False

    def enter(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input. Whole numbers, as token ids and masks, keep their values, which code looks into."""
        if tensor.is_floating_point() and tensor.numel() > 1:
            tensor = on_meta(tensor)
        self.count(tensor)
        return tensor

    def count(self, tensor: torch.Tensor) -> None:
        """Add the storage of a tensor, once, until it is gone."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.counted:
            self.counted.add(storage._cdata)
            weakref.finalize(storage, self._forget, self.counted, storage._cdata, storage.nbytes()).atexit = False
            self.add(storage.nbytes())

    def add(self, count: int) -> None:
        """Add bytes that are in no tensor, or take them away."""
        self.now += count
        self.peak = max(self.peak, self.now)

    def _forget(self, counted: set[int], key: int, count: int) -> None:
        counted.discard(key)
        if counted is self.counted:
            self.now -= count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        given = _tensors((args, kwargs))
        meta = any(tensor.is_meta for tensor in given)
        if meta:  # buffers and constants, as whatever else is computed from shapes alone, are on the CPU
            args, kwargs = tree_map_only(torch.Tensor, on_meta, (args, kwargs))
            given = _tensors((args, kwargs))
        if kwargs.get("device") is not None and (given or not self.inside):
            kwargs["device"] = _META if meta else _CPU
        result = func(*args, **kwargs)
        if meta and func is _CONVOLUTION and len(result) > 1:  # which leaves channels last where they come so
            result = result.contiguous(memory_format=suggest_memory_format(given[0]))
        if self.inside:
            known = {tensor.untyped_storage()._cdata for tensor in given}
            made = [tensor for tensor in _tensors(result) if tensor.untyped_storage()._cdata not in known]
            passing = scratch(func, args, made[0], self.device) if meta and made else 0
            for tensor in made:
                self.count(tensor)
            self.add(passing)
            self.add(-passing)
        return result


class Kernels(TorchFunctionMode):
    """What kernels do that the meta device has not: attention is fused, and holds no scores but one float32 per row of
    them; on the CPU, a group norm of several images keeps their channels last."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func is nn.functional.group_norm and self.device.type == "cpu" and args[0].is_meta and len(args[0]) > 1:
            return torch.empty_like(args[0], memory_format=suggest_memory_format(args[0]))
        return func(*args, **kwargs)


def _attention(query, key, value, *args, **kwargs):
    if not query.is_meta:
        return nn.functional.scaled_dot_product_attention(query, key, value, *args, **kwargs)
    *batch, heads, rows, _ = query.shape
    result = query.new_empty(*batch, rows, heads, value.shape[-1]).transpose(-2, -3)
    query.new_empty(*batch, heads, rows, dtype=torch.float32)
    return result


def _tensors(value: Any) -> list[torch.Tensor]:
    return [item for item in tree_flatten(value)[0] if isinstance(item, torch.Tensor)]


def on_meta(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that holds nothing."""
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=_META)
