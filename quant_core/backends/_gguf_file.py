"""Reading and writing .gguf files (format: ggml-org/ggml docs/gguf.md) as the weights of one component."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SourceError, choices, one_sentence

# Encoders whose tensors llama.cpp only renames; it permutes or shifts those of the others.
_RENAMED = {"t5": "T5ENCODER", "t5encoder": "T5ENCODER", "qwen2": "QWEN2", "qwen3": "QWEN3"}
_MOST_DIMENSIONS = 4  # of a ggml tensor


def read(path: Path) -> Any:
    """The open file, memory-mapped.

    Raises:
        SourceError: it is no whole gguf file.
    """
    import gguf

    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, OverflowError, UnicodeDecodeError, MemoryError) as error:
        raise SourceError(f"{path.name} is truncated or no gguf file ({one_sentence(error)}).") from None


def tensor_names(reader: Any, model: Any) -> dict[str, str] | None:
    """Parameter name to tensor name for the model, or None where the file is written in foreign names.

    Raises:
        SourceError: it is an encoder whose tensors llama.cpp has transformed.
    """
    import gguf

    present = {tensor.name for tensor in reader.tensors}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if present & parameters:
        return {name: name for name in parameters & present}
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field else "none"
    if not hasattr(model, "config_class"):  # diffusers knows how to convert some of these
        return None
    if architecture not in _RENAMED:
        raise SourceError(
            f"the gguf file is of architecture {architecture!r}, whose weights llama.cpp transforms; "
            f"files of {choices(_RENAMED)} can be read, any other encoder can be quantized by gguf/Q8_0."
        )
    layers = {int(name.split(".")[index]) for name in parameters for index in _numbers(name)[:1]}
    known = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, _RENAMED[architecture]), len(layers))
    names = {}
    for parameter in parameters:
        found = (known.get_name(prefix + parameter, (".weight", ".bias")) for prefix in ("", "model."))
        if (tensor := next(filter(None, found), None)) in present:
            names[parameter] = tensor
    return names


def _numbers(name: str) -> list[int]:
    return [index for index, part in enumerate(name.split(".")) if part.isdigit()]


def write(path: Path, architecture: str, tensors: Iterable[tuple[str, Any, str]]) -> None:
    """Write (name, tensor, type) as a gguf file, whole or not at all.

    A type is the name of a ggml type; a tensor of a block type is the array of its packed bytes.
    """
    import gguf
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    writer = gguf.GGUFWriter(partial, architecture)
    try:
        for name, tensor, kind in tensors:
            qtype = getattr(gguf.GGMLQuantizationType, kind)
            if kind == "BF16":
                tensor = tensor.view(torch.int16).numpy().view("uint16")
                tensor = tensor.reshape(-1) if tensor.ndim > _MOST_DIMENSIONS else tensor
                writer.add_tensor(name, tensor.view("uint8"), raw_dtype=qtype)
            elif kind in ("F16", "F32"):
                tensor = tensor.numpy()
                writer.add_tensor(name, tensor.reshape(-1) if tensor.ndim > _MOST_DIMENSIONS else tensor)
            else:
                writer.add_tensor(name, tensor, raw_dtype=qtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
