"""Hooks of the libraries on a model, for as long as they are wanted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

# What diffusers and accelerate set on modules.
_NAMES = ("forward", "_diffusers_hook", "_cache_config", "_hf_hook", "_old_forward", "to", "cuda")


@contextmanager
def taken_back(models: Iterable[nn.Module]) -> Iterator[None]:
    """Whatever hooks diffusers or accelerate put on the models or their parts meanwhile are gone afterwards, and what
    was there before is there again.

    Their own removal leaves `forward` on each module. A hook of diffusers and its record of functions hold each other,
    and the record holds the module, so that only the garbage collector would free it: both are emptied.
    """
    parts = {part: None for model in models for part in model.modules()}
    before = [(part, {name: vars(part)[name] for name in _NAMES if name in vars(part)}) for part in parts]
    held = {
        id(registry): _contents(registry) for _, own in before if (registry := own.get("_diffusers_hook")) is not None
    }
    try:
        yield
    finally:
        for part, own in before:
            registry, config = vars(part).get("_diffusers_hook"), vars(part).get("_cache_config")
            if config is not None and config is not own.get("_cache_config"):
                vars(config).clear()  # its functions may hold the model
            if registry is not None:
                _empty(registry, held.get(id(registry)))
            for name in _NAMES:
                vars(part).pop(name, None)
            vars(part).update(own)


def _contents(registry: Any) -> tuple[dict[str, Any], list[str], list[Any]]:
    return dict(registry.hooks), list(registry._hook_order), list(registry._fn_refs)


def _empty(registry: Any, had: tuple | None) -> None:
    """Leave in a registry what it had; nothing at all if it was not there."""
    hooks, order, records = had or ({}, [], [])
    kept = {id(piece) for piece in (*hooks.values(), *records)}
    for piece in (*registry.hooks.values(), *registry._fn_refs):
        if id(piece) not in kept:
            vars(piece).clear()
    if had is None:
        vars(registry).clear()
    else:
        registry.hooks, registry._hook_order, registry._fn_refs = hooks, order, records
        registry._child_registries_cache = None
