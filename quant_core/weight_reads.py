"""Linear layers whose weight the code around them reads, instead of calling the layer: found in that code."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

from torch import nn

_ENTRIES = ("forward", "encode", "decode")  # by which pipelines use a model
_WORDS = {"weight", "parameters", "get_parameter_dtype"}
_PATH = r"((?:\.\w+|\[[^\]]*\])*)"  # of a module below another, as `.mlp[0]`
_ASKING = {".dtype", ".shape", ".size", ".ndim"}  # of which a packed weight tells its own
_HARMLESS = {".device", ".requires_grad", " is"}
_TELLS_APART = ("int8", "is_floating_point")  # of code that knows of packed weights


class Read(NamedTuple):
    """Whose code reads a layer's weight, and whether it only asks for its dtype or shape."""

    reader: str
    asks: bool


def weight_reads(model: nn.Module) -> dict[str, Read]:
    """The layers of a model whose weight other code reads while it runs, by full name. The model may be on meta."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, Read] = {}
    for parent in names:
        processor = getattr(parent, "processor", None)
        readers = [_reads(type(parent), _ENTRIES, 0)]
        if processor is not None and not isinstance(processor, nn.Module):
            readers.append(_reads(type(processor), ("__call__",), 1))
        for read, find, path in (use for reads in readers for use in reads):
            for layer in find(_below(parent, path)):
                name = names[layer]
                if name not in found or found[name].asks:
                    found[name] = read
    return found


Use = tuple[Read, Callable[[Iterator[nn.Module]], Iterator[nn.Linear]], str]


@cache
def _reads(kind: type, entries: tuple[str, ...], argument: int) -> tuple[Use, ...]:
    """What the methods of a class read of the layers below the module that is their `argument`: each use with the path
    to the module that it is about, and how the layers are found there."""
    uses = []
    for function in _reachable(kind, entries):
        code = function.__code__
        if _names(code).isdisjoint(_WORDS) or code.co_argcount <= argument:
            continue
        root, text = re.escape(code.co_varnames[argument]), _source(function)
        asks, reads = Read(kind.__name__, True), Read(kind.__name__, False)
        knows = any(word in text for word in _TELLS_APART)
        for prefix, path, what in re.findall(rf"(isinstance\()?\b{root}{_PATH}\.weight\b(\.\w+| is\b)?", text):
            if path and not prefix and what not in _HARMLESS and not (knows and what in _ASKING):
                uses.append((asks if what in _ASKING else reads, _linear, path))
        if not knows:
            first = re.findall(rf"next\((?:iter\()?{root}{_PATH}\.parameters\(\)\)+\.dtype", text)
            whole = re.findall(rf"get_parameter_dtype\({root}{_PATH}\)", text)
            uses += [(asks, _first, path) for path in first] + [(asks, _bare, path) for path in whole]
    return tuple(uses)


def _reachable(kind: type, entries: tuple[str, ...]) -> Iterator[Callable]:
    """The methods and properties of a class by which it is used, and those that they name."""
    seen, todo = set(), list(entries)
    while todo:
        name = todo.pop()
        found = inspect.getattr_static(kind, name, None)
        found = inspect.unwrap(getattr(found, "fget", None) or getattr(found, "__func__", None) or found)
        if name not in seen and inspect.isfunction(found):
            seen.add(name)
            todo += _names(found.__code__)
            yield found


def _names(code: CodeType) -> set[str]:
    inner = (_names(part) for part in code.co_consts if isinstance(part, CodeType))
    return set(code.co_names).union(*inner)


def _source(function: Callable) -> str:
    """A function's text without comments and in one style; nothing where there is none."""
    try:
        return ast.unparse(ast.parse(textwrap.dedent(inspect.getsource(function))))
    except (OSError, SyntaxError):
        return ""


def _below(module: Any, path: str) -> Iterator[nn.Module]:
    """The modules at a path below another: several where an index is no number."""
    found = [module]
    for name, index in re.findall(r"\.(\w+)|\[([^\]]*)\]", path):
        if name:
            found = [getattr(part, name, None) for part in found]
        else:
            found = [part for whole in found for part in _items(whole, index)]
        found = [part for part in found if isinstance(part, nn.Module)]
    return iter(found)


def _items(whole: Any, index: str) -> list[nn.Module]:
    parts = list(whole.children())
    if re.fullmatch(r"-?\d+", index):
        return parts[int(index) :][:1] if abs(int(index)) <= len(parts) else []
    return parts


def _linear(modules: Iterator[nn.Module]) -> Iterator[nn.Linear]:
    return (module for module in modules if isinstance(module, nn.Linear))


def _first(modules: Iterator[nn.Module]) -> Iterator[nn.Linear]:
    """Layers whose weight is the first parameter of a module."""
    for module in modules:
        owners = (part for part in module.modules() if any(weight is not None for weight in part._parameters.values()))
        yield from _linear(iter([next(owners, None)]))


def _bare(modules: Iterator[nn.Module]) -> Iterator[nn.Linear]:
    """Layers that have nothing but a weight, so that its dtype is all that can be found."""
    return (layer for layer in _linear(modules) if layer.bias is None)
