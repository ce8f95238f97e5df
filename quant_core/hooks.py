"""Hooks of the libraries on a model, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_NAMES = ("forward", "_diffusers_hook", "_hf_hook", "_old_forward", "to", "cuda")  # what the libraries set on modules


@contextmanager
def taken_back(models: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever hooks diffusers or accelerate put on the models or their parts meanwhile are gone afterwards, and what
    was there before is there again. Their own removal leaves cycles, by which a module holds itself."""
    parts = {part: None for model in models for part in model.modules()}
    before = [(part, {name: vars(part)[name] for name in _NAMES if name in vars(part)}) for part in parts]
    try:
        yield
    finally:
        for part, own in before:
            registry = vars(part).get("_diffusers_hook")
            if registry is not None and own.get("_diffusers_hook") is not registry:
                _take_apart(registry)
            for name in _NAMES:
                vars(part).pop(name, None)
            vars(part).update(own)


def _take_apart(registry: Any) -> None:
    """diffusers' hooks and the functions that call them hold each other and the model."""
    for piece in (*registry.hooks.values(), *registry._fn_refs, registry):
        vars(piece).clear()
