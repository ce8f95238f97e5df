"""The linear layers of a model in groups that do the same work, with the patterns that name each group."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .layers import linear_layers

FIRST, LAST = "first block", "last block"
_FEWEST = 3  # blocks of which the first and the last stand for themselves
_OUTPUT = re.compile(r"out|final|head")
_ROLES = {  # of a layer in a block: of the innermost module around it, else of itself, the first that its name has
    "modulation": re.compile(r"norm|ada|mod|time_emb|scale_shift", re.I),
    "attention": re.compile(r"attn|attention|to_[qkv]|qkv", re.I),
    "feed-forward": re.compile(r"ff|mlp|feed_forward|fc\d|dense|^net$|proj|expert", re.I),
}


@dataclass(frozen=True)
class LayerGroup:
    """Layers that do the same work. The patterns are those of skip lists; between groups the first one counts."""

    name: str
    layers: tuple[str, ...]
    patterns: tuple[str, ...]


def layer_groups(model: nn.Module) -> list[LayerGroup]:
    """The first and the last block; of the others attention, feed-forward, modulation; outside of blocks embedders and
    output. Each layer is in one group, and a group that would be empty is left out."""
    layers = [name for name, _ in linear_layers(model)]
    blocks = _blocks(model)
    ends = _ends(blocks, layers)
    members: dict[str, list[str]] = {}
    for layer in layers:
        block = next((block for block in blocks if layer.startswith(f"{block}.")), None)
        members.setdefault(ends.get(block) or _role(layer, block), []).append(layer)
    inner = {layer for name in ends.values() for layer in members.get(name, ())}
    groups = [LayerGroup(name, tuple(members[name]), (block,)) for block, name in ends.items()]
    for name, found in members.items():
        if name not in ends.values():
            groups.append(LayerGroup(name, tuple(found), tuple(_patterns(found, set(layers) - inner - set(found)))))
    return groups


def single_layers(model: nn.Module) -> list[LayerGroup]:
    """Each linear layer as a group of its own."""
    return [LayerGroup(name, (name,), (name,)) for name, _ in linear_layers(model)]


BY = {"group": layer_groups, "layer": single_layers}  # the ways to divide a model


def plain_patterns(group: LayerGroup, all_layers: Iterable[str]) -> tuple[str, ...]:
    """Patterns that name the layers of a group and no other, whatever comes before them."""
    others = set(all_layers) - set(group.layers)
    return tuple(
        dict.fromkeys(
            next(part for part in _prefixes(layer) if not any(_inside(other, part) for other in others))
            for layer in group.layers
        )
    )


def _blocks(model: nn.Module) -> list[str]:
    """The children of the outermost lists of modules, in the order of registration."""
    found: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(_inside(name, block) for block in found):
            found += [f"{name}.{index}" for index in range(len(module))]
    return found


def _ends(blocks: list[str], layers: list[str]) -> dict[str, str]:
    """The first and the last block that has layers, of the lists that are least deep in the model."""
    used = [block for block in blocks if any(layer.startswith(f"{block}.") for layer in layers)]
    least = min((block.count(".") for block in used), default=0)
    outer = [block for block in used if block.count(".") == least]
    return {outer[0]: FIRST, outer[-1]: LAST} if len(outer) >= _FEWEST else {}


def _role(layer: str, block: str | None) -> str:
    if block is None:
        return "output" if _OUTPUT.search(layer.split(".")[0]) else "embedders"
    *around, own = layer.removeprefix(f"{block}.").split(".")
    parts = [*reversed(around), own]
    return next((role for part in parts for role, known in _ROLES.items() if known.search(part)), "other layers")


def _patterns(layers: list[str], others: set[str]) -> Iterator[str]:
    """For each layer the shortest beginning of its name, any number standing for all, that names no other."""
    general = {_general(other) for other in others}
    seen = set()
    for layer in layers:
        for part in _prefixes(_general(layer)):
            if not part.endswith("*") and not any(_inside(other, part) for other in general):
                break
        else:
            part = layer
        if part not in seen:
            seen.add(part)
            yield part


def _general(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _inside(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
