"""Which tensor of a .gguf file is which weight of a model.

Its names are the model's own, llama.cpp's, or those of the model's first release, which diffusers converts.
"""

from __future__ import annotations

import logging
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from ..accounting import check_surplus, counted, whole_parts
from ..errors import SourceError, choices, is_out_of_memory
from ..source import ComponentInfo
from ._gguf_reading import File, values

logger = logging.getLogger(__name__)

# Encoders whose tensors llama.cpp only renames; it permutes or shifts those of the others.
_RENAMED = {"t5": "T5ENCODER", "t5encoder": "T5ENCODER", "qwen2": "QWEN2", "qwen3": "QWEN3"}


def named_values(info: ComponentInfo, model: Any, file: File, device: str = "cpu") -> dict[str, Any]:
    """The values of a file by the names that the model has for them.

    Raises:
        SourceError: it is of another model, has tensors that the model does not take, or is an encoder whose tensors
            llama.cpp has transformed.
    """
    own, found = weights(model), values(file, device)
    known = found.keys() & own.keys()
    if 2 * len(known) > len(found):
        check_surplus(info, model, found.keys() - own.keys())
        return {name: found[name] for name in known}
    if hasattr(model, "config_class"):
        return {name: found[tensor] for name, tensor in _of_llama_cpp(model, file).items()}
    return _converted(info, model, file, found)


def weights(model: Any) -> dict[str, Any]:
    """All that a checkpoint of the model holds: its parameters and persistent buffers, shared ones under each name."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _of_llama_cpp(model: Any, file: File) -> dict[str, str]:
    import gguf

    if file.architecture not in _RENAMED:
        raise SourceError(
            f"{file.path.name} is of architecture {file.architecture!r}, whose weights llama.cpp transforms or whose "
            f"model is another; files of {choices(_RENAMED)} can be read, any other encoder can be quantized by "
            "gguf/Q8_0."
        )
    own = weights(model)
    layers = {int(name.split(".")[index]) for name in own for index in _numbers(name)[:1]}
    map_ = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _RENAMED[file.architecture]), len(layers))
    names = {}
    for weight in own:
        found = (map_.get_name(prefix + weight, (".weight", ".bias")) for prefix in ("", "model."))
        if (tensor := next(filter(None, found), None)) in file.tensors:
            names[weight] = tensor
    if not names:
        raise another_model(model, file)
    surplus = sorted(file.tensors.keys() - set(names.values()))
    parts = whole_parts(surplus, names.values())  # such as the decoder of a T5 and the head of a language model
    if left := [name for name in surplus if name not in parts]:
        raise SourceError(
            f"{file.path.name} has {counted(left)} that {type(model).__name__} does not take, as {left[0]}; "
            "it and the config.json are not of one model."
        )
    if parts:
        logger.info("%s: %s does not use %s.", file.path.name, type(model).__name__, choices(parts)[:200])
    return names


def _numbers(name: str) -> list[int]:
    return [index for index, part in enumerate(name.split(".")) if part.isdigit()]


class _Asked(UserDict):
    """Tensors by name, which knows those that were asked for."""

    def __init__(self, tensors: Mapping[str, Any]):
        self.asked: set[str] = set()
        super().__init__(tensors)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)


def _converted(info: ComponentInfo, model: Any, file: File, found: dict[str, Any]) -> dict[str, Any]:
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    classes = {cls.__name__ for cls in type(model).__mro__}
    known = [about["checkpoint_mapping_fn"] for name, about in SINGLE_FILE_LOADABLE_CLASSES.items() if name in classes]
    if not known:
        raise SourceError(
            f"{file.path.name} is not written in the names of {type(model).__name__}, and diffusers converts no other "
            "for it; make one with gguf/Q8_0 instead."
        )
    asked = _Asked(found)
    try:
        made = dict(known[0](checkpoint=asked, config=info.config))
    except Exception as error:  # whatever a converter makes of names that it does not know
        if is_out_of_memory(error):
            raise
        raise another_model(model, file) from error
    if not made.keys() & weights(model).keys():
        raise another_model(model, file)
    check_surplus(info, model, (made.keys() - weights(model).keys()) | (found.keys() - asked.asked))
    return {name: value for name, value in made.items() if name in weights(model)}


def another_model(model: Any, file: File) -> SourceError:
    """The error of a file that is not of the model."""
    cls, known = type(model).__name__, len(file.tensors.keys() & weights(model).keys())
    return SourceError(
        f"{file.path.name} is not of {cls}: it says that its architecture is {file.architecture!r}, {known} of its "
        f"{len(file.tensors)} tensors have names of {cls}, and diffusers does not know the others as its."
    )
