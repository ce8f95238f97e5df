"""What becomes of each tensor of a checkpoint: its class takes it, it is harmless, it is a leftover, or an error.

A tensor that the class does not take is harmless if
- the class says so itself (`_keys_to_ignore_on_load_unexpected` in both libraries);
- it is a buffer that the class computes, which older versions of the libraries saved, also in another place
  (`embeddings.position_ids`, `layers.0.self_attn.rotary_emb.inv_freq`);
- it is of a part that the class is wholly without, and the config names another class for the checkpoint (the head of
  a language model, the image half of a CLIP).

A leftover (see `leftovers`) is left out of the model as both libraries do, and the user is told.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import nn

from .architecture import is_transformers
from .errors import SourceError
from .headers import Stored
from .leftovers import leftovers
from .source import ComponentInfo

logger = logging.getLogger(__name__)

# Weights as numbers. Float8 without scales are numbers, too; other names are bytes that mean something else.
_NUMBERS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_FORMATS = {  # how the names of a quantized checkpoint end, and what that is
    "scaled_fp8": "ComfyUI's scaled fp8",
    "scale_weight": "ComfyUI's scaled fp8",
    "comfy_quant": "ComfyUI's quantized",
    "weight_scale": "a quantized",
    "weight_scale_inv": "a quantized",
    "input_scale": "a quantized",
    "zero_point": "a quantized",
    "qzeros": "GPTQ's or AWQ's",
    "absmax": "bitsandbytes' 4-bit",
    "SCB": "bitsandbytes' 8-bit",
    "weight._scale": "quanto's",
    "weight_qdata": "torchao's",
    "qweight": "GPTQ's or AWQ's",
    "lora_A.weight": "a LoRA's",
    "lora_down.weight": "a LoRA's",
}
_LONGEST = 80  # characters of a name in a sentence


class Place(NamedTuple):
    """Where a component's library puts a tensor of its files."""

    file_name: str
    name: str  # that the model would have for it
    converted: bool  # together with others, or into several


def check_tensors(info: ComponentInfo, model: nn.Module, tensors: Mapping[str, Stored], sharded: bool) -> list[str]:
    """Check that a component that is not quantized takes every tensor of its files, by their names, dtypes and shapes.

    `model` is the component without its weights, and `sharded` whether an index names its files. What is left over is
    returned.

    Raises:
        SourceError: a tensor has no place in the class, the same as another, or is not what the class takes there.
    """
    found = list(places(model, tensors, sharded))  # before the names of the model, some of which may go by it
    own, taken, surplus = model.state_dict(), dict[str, Place](), []
    for place in found:
        if place.name not in own:
            surplus.append(place)
            continue
        before = taken.setdefault(place.name, place)
        if before is not place and not (before.converted and place.converted):
            one, two = _short(before.file_name), _short(place.file_name)
            raise SourceError(f"{info.name}: its checkpoint has both {one} and {two}, which are one weight.")
    left = check_surplus(info, model, [place.name for place in surplus], lenient=True)
    for name, place in taken.items():
        stored, weight = tensors[place.file_name], own[name]
        what = f"{info.name}: {stored.file.name} stores {_short(place.file_name)} as"
        if weight.is_floating_point() and stored.dtype not in _NUMBERS:
            raise SourceError(
                f"{what} {stored.dtype}, which are no weights as {type(model).__name__} takes them; if they are "
                "quantized, its config.json should say how in quantization_config."
            )
        if not place.converted and stored.shape != tuple(weight.shape):
            raise SourceError(f"{what} {stored.shape}, and {type(model).__name__} takes {tuple(weight.shape)} there.")
    return left


def places(model: nn.Module, names: Iterable[str], sharded: bool) -> Iterator[Place]:
    """Where the library of a model puts tensors of these names; it has no say in which the model has no name for."""
    if not is_transformers(model):
        renamed = {name: name for name in names}
        if not sharded:  # as ModelMixin.from_pretrained
            model._fix_state_dict_keys_on_load(renamed)
        lost = set(names) - set(renamed.values())  # to others that are renamed to the same
        yield from (Place(name, place, False) for place, name in renamed.items())
        yield from (Place(name, place, False) for name in lost for place in _renamed_alone(model, name))
        return
    # As convert_and_load_state_dict_in_model; peft shares these functions.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    own = model.state_dict()
    for name in names:
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if place not in own and name in own:
            place, pattern = rename_source_key(name, [], [], model.base_model_prefix, own)
        yield Place(name, place, pattern is not None)


def _renamed_alone(model: nn.Module, name: str) -> Iterable[str]:
    renamed = {name: name}
    model._fix_state_dict_keys_on_load(renamed)
    return renamed


def check_surplus(info: ComponentInfo, model: nn.Module, names: Collection[str], lenient: bool = False) -> list[str]:
    """Check that names that a model does not have are harmless, and log what they are.

    What is left over is an error, too, unless `lenient`: then it is returned.

    Raises:
        SourceError: one is not harmless.
    """
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    computed = {
        ".".join([*path.split("."), name][-2:])
        for path, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    left = [
        name
        for name in sorted(names)
        if not any(re.search(pattern, name) for pattern in ignored) and ".".join(name.split(".")[-2:]) not in computed
    ]
    told = info.config.get("architectures")
    if isinstance(told, list) and told and type(model).__name__ not in told:
        parts = set(whole_parts(left, [*model.state_dict(), getattr(model, "base_model_prefix", "")]))
        left = [name for name in left if name not in parts]
    over = leftovers(model, left) if lenient and not _format(left) else []
    if wrong := [name for name in left if name not in over]:
        raise SourceError(f"{info.name}: its checkpoint {_surplus(model, wrong)}.")
    if names:
        logger.info("%s: %s does not use %s.", info.name, type(model).__name__, listed(names))
    return over


def whole_parts(names: Iterable[str], used: Iterable[str]) -> list[str]:
    """Those of the names that are of a part, by its first name, of which nothing is used."""
    parts = {name.partition(".")[0] for name in used}
    return [name for name in names if name.partition(".")[0] not in parts]


def _surplus(model: nn.Module, names: list[str]) -> str:
    """What a checkpoint with names that the model does not have looks like."""
    cls = type(model).__name__
    if found := _format(names):
        words, name = found
        words = f"is in {words} format, whose {_short(name)} {cls} does not read"
        return f"{words}; load the checkpoint that it was made from"
    modules = dict(model.named_modules())
    for name in names:
        for path, number in re.findall(r"(?=(.+?)\.(\d+)(?:\.|$))", name):
            blocks = modules.get(path)
            if isinstance(blocks, nn.ModuleList) and int(number) >= len(blocks):
                return (
                    f"has {path}.{number}, and its config.json describes {len(blocks)} {path}; "
                    "the two are not of one model"
                )
    return (
        f"has {counted(names)} that {cls} does not take, as {_short(names[0])}; "
        "load one that is of the model that its config.json describes"
    )


def _format(names: Collection[str]) -> tuple[str, str] | None:
    """What a quantized checkpoint is called, and the name that tells it."""
    endings = ((ending, words, name) for ending, words in _FORMATS.items() for name in names)
    return next(((words, name) for ending, words, name in endings if f".{name}".endswith(f".{ending}")), None)


def counted(names: Collection[str]) -> str:
    """How many tensors these are."""
    return "1 tensor" if len(names) == 1 else f"{len(names)} tensors"


def listed(names: Collection[str]) -> str:
    """What a sentence calls these tensors."""
    first = _short(min(names))
    return first if len(names) == 1 else f"{len(names)} tensors, as {first}"


def _short(name: str) -> str:
    """A name from a file, for a sentence."""
    name = " ".join(name.split())
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 3]}..."
