"""A pipeline as it was: what a run writes to it, its components and all that they hold is taken back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from .placement import Placement
from .transfer import is_wrapper

_LIBRARIES = ("diffusers", "transformers")  # whose objects are looked into
_CONTAINERS = frozenset((dict, OrderedDict, list, set))
_LONG = 10_000  # entries of a list or a dict: a vocabulary, which no run changes


@contextmanager
def unchanged(pipe: Any, placements: Iterable[Placement] = ()) -> Iterator[None]:
    """Whatever is written meanwhile to a diffusers pipeline or to what it holds is taken back, however that ends:
    attributes, lists and dicts of its own and of its schedulers, tokenizers, processors, guiders and all modules of
    its components, hooks and weights among them. Pipelines turn a VAE to float32 for the decode, exchange attention
    processors, write into configs, leave hooks; models remember what they saw.

    `placements` are those of its components, whose weights are put back where they stay. Not seen is what is written
    into a tensor that was there before.
    """
    placements = list(placements)
    with _at_home(placements):
        state = _State(pipe, {id(part) for placement in placements for part in placement.modules()})
    try:
        yield
    finally:
        with _at_home(placements):
            state.put_back()


@contextmanager
def _at_home(placements: list[Placement]) -> Iterator[None]:
    with ExitStack() as stack:
        for placement in placements:
            stack.enter_context(placement.at_home())
        yield


class _State:
    """All that can be reached from an object, as it is now. Of modules that are `placed`, weights are replaced by
    whoever changes them; those of others may be changed in place."""

    def __init__(self, root: Any, placed: set[int]):
        self._empty: list[Any] = []  # dicts, lists and sets: most of what a module holds
        self._dicts: list[tuple[dict, dict]] = []
        self._lists: list[tuple[Any, list]] = []  # and what is like one
        self._sets: list[tuple[set, set]] = []
        self._tokenizers: list[tuple[Any, dict | None, dict | None]] = []
        self._data: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._parts: list[tuple[dict, str, dict[str, torch.Tensor], tuple]] = []
        self._savers: dict[type, Callable[[_State, Any], None] | None] = {}
        self._todo: list[Any] = []
        seen = {id(root)}
        self._save_object(root)
        while self._todo:
            value = self._todo.pop()
            if id(value) not in seen:
                seen.add(id(value))
                self._savers[type(value)](self, value)
                if isinstance(value, nn.Module) and id(value) not in placed:
                    self._save_weights(value)

    def put_back(self) -> None:
        """Make everything what it was."""
        for held in self._empty:
            if held:
                held.clear()
        for held, before in self._dicts:
            if not (_same(held, before) and _same(held.values(), before.values())):
                _refill(held, before)
        for held, before in self._lists:
            if not _same(held, before):
                held.clear()
                held.extend(before)
        for held, before in self._sets:
            held.intersection_update(before)
            held.update(before)
        for tokenizer, truncation, padding in self._tokenizers:
            _tell(tokenizer, truncation, padding)
        for tensor, data in self._data:
            if tensor.data_ptr() != data.data_ptr() or tensor.dtype != data.dtype:
                tensor.data = data
        for held, name, parts, form in self._parts:
            _put_parts(held, name, parts, form)

    def _look_into(self, values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _CONTAINERS and not value:
                self._empty.append(value)
                continue
            if kind not in self._savers:
                self._savers[kind] = _saver(kind)
            if self._savers[kind]:
                self._todo.append(value)

    def _save_object(self, value: Any) -> None:
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            self._save_dict(own)

    def _save_config(self, value: Any) -> None:
        self._save_dict(value)
        self._save_object(value)

    def _save_dict(self, value: dict) -> None:
        if len(value) < _LONG:
            self._dicts.append((value, dict(value)))
            self._look_into(value.values())

    def _save_list(self, value: Any) -> None:
        if len(value) < _LONG:
            self._lists.append((value, list(value)))
            self._look_into(value)

    def _save_set(self, value: set) -> None:
        self._sets.append((value, set(value)))

    def _save_tokenizer(self, value: Any) -> None:
        """Of the tokenizers library: how it was told to cut and to fill, at its last call."""
        self._tokenizers.append((value, value.truncation, value.padding))

    def _save_weights(self, module: nn.Module) -> None:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and is_wrapper(tensor):
                    inner, about = tensor.__tensor_flatten__()
                    form = (about, tensor.size(), tensor.stride())
                    self._parts.append((held, name, {key: getattr(tensor, key) for key in inner}, form))
                elif tensor is not None:
                    self._data.append((tensor, tensor.data))


def _saver(kind: type) -> Callable[[_State, Any], None] | None:
    """What saves an object of a class; None of a class that nobody looks into."""
    libraries = {base.__module__.partition(".")[0] for base in kind.__mro__}
    if issubclass(kind, nn.Module) or not libraries.isdisjoint(_LIBRARIES):
        return _State._save_config if issubclass(kind, dict) else _State._save_object
    if (kind.__module__, kind.__name__) == ("tokenizers", "Tokenizer"):
        return _State._save_tokenizer
    savers = {
        dict: _State._save_dict,
        list: _State._save_list,
        deque: _State._save_list,
        set: _State._save_set,
        tuple: _State._look_into,
    }
    return next((save for base, save in savers.items() if issubclass(kind, base)), None)


def _same(one: Any, other: Any) -> bool:
    return len(one) == len(other) and all(map(is_, one, other))


def _refill(held: dict, before: dict) -> None:
    kind = OrderedDict if isinstance(held, OrderedDict) else dict  # some configs refuse to be written to
    kind.clear(held)
    for key, value in before.items():
        kind.__setitem__(held, key, value)


def _tell(tokenizer: Any, truncation: dict | None, padding: dict | None) -> None:
    if tokenizer.truncation != truncation:
        tokenizer.enable_truncation(**truncation) if truncation else tokenizer.no_truncation()
    if tokenizer.padding != padding:
        tokenizer.enable_padding(**padding) if padding else tokenizer.no_padding()


def _put_parts(held: dict, name: str, parts: dict[str, torch.Tensor], form: tuple) -> None:
    tensor = held[name]
    if any(getattr(tensor, key) is not part for key, part in parts.items()):
        made = type(tensor).__tensor_unflatten__(parts, *form)
        held[name] = nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
