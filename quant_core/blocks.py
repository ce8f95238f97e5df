"""The blocks of a model: what runs one after the other, so that the weights of one are needed at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

Size = Callable[[Iterable[nn.Module]], int]  # bytes of what modules hold themselves

_SMALLEST = 1000  # a block of less than this part of the whole stays with what is always there
_LARGEST = 8  # a block of more than this part of the whole is divided further, where it has blocks of its own
_NEVER_RUN = (nn.ModuleList, nn.ModuleDict)  # only what they hold is


def divide(module: nn.Module, size: Size) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks of a model in order of registration, and all modules that are in none of them."""
    total = size(module.modules())
    blocks = [block for block in _blocks(module, total / _LARGEST, size) if size(block.modules()) * _SMALLEST >= total]
    users = _uses(module)
    blocks = [block for block in blocks if all(users[key] == count for key, count in _uses(block).items())]
    inside = {id(part) for block in blocks for part in block.modules()}
    return blocks, [part for part in module.modules() if id(part) not in inside]


def _blocks(module: nn.Module, most: float, size: Size) -> list[nn.Module]:
    found = []
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, _NEVER_RUN)
        whole = size(child.modules())
        inner = [] if listed and whole <= most else _blocks(child, most, size)
        if listed and 2 * sum(size(block.modules()) for block in inner) < whole:
            inner = [child]  # what it holds beside its own blocks is most of it
        found += inner
    return list(dict.fromkeys(found))


def _uses(module: nn.Module) -> Counter:
    """How often each tensor is used, a module that stands in two places counted twice: weights that are used outside
    of a block too cannot come and go with it."""
    parts = (part for _, part in module.named_modules(remove_duplicate=False))
    held = (tensor for part in parts for tensors in (part._parameters, part._buffers) for tensor in tensors.values())
    return Counter(id(tensor) for tensor in held if tensor is not None)


def spread(blocks: list[Any]) -> list[Any]:
    """The blocks in an order of which each beginning is spread evenly (van der Corput's sequence), so that a few
    streamed blocks are copied while the many between them compute."""
    width = max(len(blocks) - 1, 1).bit_length()
    order = [int(format(number, f"0{width}b")[::-1], 2) for number in range(2**width)]
    return [blocks[index] for index in order if index < len(blocks)]
