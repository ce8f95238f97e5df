"""What text encoders said, so that a prompt they have seen neither runs nor moves them again."""

from __future__ import annotations

import hashlib
import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

LIMIT = 2**30  # bytes


class EncoderMemory:
    """Outputs of text encoders by their exact inputs, the least recently used forgotten beyond `limit` bytes.

    Outputs are kept on the CPU and handed out as copies.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self.enabled = True
        self.size = 0  # bytes kept
        self._kept: OrderedDict[tuple, tuple[Any, int]] = OrderedDict()

    def recall(self, key: tuple, device: torch.device) -> Any:
        """A copy on a device of what was kept under a key, None if nothing was."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return _each_tensor(self._kept[key][0], lambda tensor: tensor.to(device, copy=True))

    def keep(self, key: tuple, output: Any) -> None:
        """Keep a copy of an output, unless it is larger than the limit or more than tensors in plain containers."""
        found: dict[int, torch.Tensor] = {}

        def note(tensor):
            found[id(tensor)] = tensor
            return tensor

        try:
            _each_tensor(output, note)
        except _Unknown:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
        if size > self.limit:
            return
        self.size -= self._kept.pop(key, (None, 0))[1]
        self._kept[key] = _each_tensor(output, lambda tensor: tensor.detach().to("cpu", copy=True)), size
        self.size += size
        while self.size > self.limit:
            self.size -= self._kept.popitem(last=False)[1][1]

    def forget(self) -> None:
        """Drop all, as after a change of an encoder's weights that PyTorch does not count."""
        self._kept.clear()
        self.size = 0


def remembering(module: nn.Module, name: str, memory: EncoderMemory, hook: Any) -> None:
    """Let an encoder answer from memory what it has answered before.

    `hook` makes it ready to run (`enter`), knows its weights wherever they are (`weights`), and has the device where
    its outputs belong (`execution_device`).
    """
    module.forward = _Forward(weakref.ref(module), name, memory, hook)


class _Forward:
    """In place of an encoder's forward, so that neither its weights nor its hooks take part in what is remembered."""

    def __init__(self, module, name, memory, hook):
        self.module, self.name, self.memory, self.hook = module, name, memory, hook
        self.weights, self.changes = [], 0  # as they were at the last use, and how often they had changed until then
        self.__signature__ = inspect.signature(module().forward)

    def __call__(self, *args, **kwargs):
        module, hook = self.module(), self.hook
        key = self._key(module, args, kwargs) if self.memory.enabled else None
        if key is not None and (kept := self.memory.recall(key, hook.execution_device)) is not None:
            return kept
        args, kwargs = hook.enter(module, args, kwargs)
        hook.running = True
        try:
            output = type(module).forward(module, *args, **kwargs)
        finally:
            hook.running = False
        if key is not None:
            self.memory.keep(key, output)
            self.weights = _stamp(hook.weights(module))  # the run may have moved them into page-locked memory
        return output

    def _key(self, module, args, kwargs):
        weights = _stamp(self.hook.weights(module))
        if not _same(weights, self.weights):
            self.weights, self.changes = weights, self.changes + 1
        try:
            return (self.name, self.changes, _plain(args), _plain(kwargs))
        except _Unknown:
            return None


def _stamp(tensors: Iterable[torch.Tensor]) -> list[tuple[weakref.ref, int]]:
    """What tells a change of weights: which tensors they are, and how often each was written to."""
    return [(weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


def _same(weights: list, others: list) -> bool:
    """Whether two stamps are of the same tensors; by what refers to them, since ids are used again."""
    return len(weights) == len(others) and all(
        one is other and version == before for (one, version), (other, before) in zip(weights, others, strict=True)
    )


class _Unknown(TypeError):
    """A value that cannot be compared or copied."""


def _plain(value: Any) -> Any:
    """A value as something to compare by, tensors as the hash of their bytes."""
    if isinstance(value, torch.Tensor):
        data = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        return ("tensor", value.dtype, tuple(value.shape), hashlib.sha256(data).digest())
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return (type(value), value)
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_plain, value))
    if isinstance(value, dict):
        return (type(value), *((key, _plain(item)) for key, item in sorted(value.items())))
    raise _Unknown(type(value).__name__)


def _each_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor], seen: dict | None = None) -> Any:
    """The same containers with each tensor changed, one that stands in two places once.

    A cache of keys and values, which text encoders of the decoder kind fill on the way, is left out.
    """
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        if id(value) not in seen:
            seen[id(value)] = change(value)
        return seen[id(value)]
    if value is None or type(value).__name__.endswith("Cache"):
        return None
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        items = {key: _each_tensor(item, change, seen) for key, item in value.items()}
        return items if type(value) is dict else type(value)(**items)  # one of transformers' outputs
    if type(value) in (list, tuple):
        return type(value)(_each_tensor(item, change, seen) for item in value)
    raise _Unknown(type(value).__name__)
