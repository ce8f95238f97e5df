"""A component's weights as a checkpoint of its library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .allocator import give_back
from .architecture import is_transformers
from .backend import Backend, Export
from .checkpoint import OWN_STEM, WeightFiles
from .container import Deferred, write_tensors
from .headers import stored_bytes
from .packed import own_tensors

Tell = Callable[[int], None]  # bytes that were written now; raise to stop

_SHARD = 5 * 10**9  # bytes, as transformers and the hub have it
_CHUNK = 16 * 2**20  # bytes that are copied at once


def copy_weights(files: WeightFiles, folder: Path, tell: Tell) -> None:
    """Copy weight files to the names that they have without a variant."""
    tag = f".{files.variant}" if files.variant else ""
    if files.index:
        shutil.copyfile(files.index, folder / files.index.name.replace(tag, ""))
    for path in files.files:
        name = path.name if files.index else path.name.replace(f"{tag}.safetensors", ".safetensors")
        with path.open("rb") as read, (folder / name).open("wb") as write:
            while part := read.read(_CHUNK):
                write.write(part)
                tell(len(part))


def write_quantized(
    folder: Path,
    model: nn.Module,
    backend: Backend,
    dtype: torch.dtype,
    layers: Collection[str],
    export: Export,
    tell: Tell,
) -> None:
    """Write a component as safetensors under the names that its library gives them, each layer within one file.

    Nothing is held but what is being written.

    Raises:
        StoreError: the disk is full, or a file cannot be written.
    """
    told = {}
    if backend.metadata:
        about = {path: backend.pack(model.get_submodule(path)).about for path in layers}
        told = backend.metadata(about, [name for name, _ in own_tensors(model, layers)])
    stem = OWN_STEM if export.obstacle else _stem(model)
    _write(folder, stem, _groups(model, backend, dtype, layers, export), told, tell)


def write_plain(folder: Path, model: nn.Module, tell: Tell) -> None:
    """Write a component that is not quantized, in the same way.

    Raises:
        StoreError: as `write_quantized` says.
    """
    tensors = dict(own_tensors(model, ()))
    if is_transformers(model):
        from transformers.core_model_loading import revert_weight_conversion

        tensors = revert_weight_conversion(model, tensors)  # to the names that checkpoints have
    _write(folder, _stem(model), ({name: tensor} for name, tensor in tensors.items()), {}, tell)


def _stem(model: nn.Module) -> str:
    return "model" if is_transformers(model) else "diffusion_pytorch_model"


def _write(
    folder: Path, stem: str, groups: Iterable[dict[str, torch.Tensor | Deferred]], told: Mapping[str, str], tell: Tell
) -> None:
    """Write groups of tensors that have to be in one file, into one or, of many, several with an index."""
    files: list[Path] = []
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor | Deferred] = {}

    def close() -> None:
        files.append(folder / f"{stem}-{len(files) + 1:05}.safetensors")
        places.update(dict.fromkeys(shard, len(files) - 1))
        write_tensors(files[-1], shard, told, tell)
        shard.clear()
        give_back()

    for group in groups:
        if shard and _size(shard) + _size(group) > _SHARD:
            close()
        shard |= group
    total = _size(shard) + sum(stored_bytes([file]) for file in files)
    close()
    if len(files) == 1:
        files[0].rename(folder / f"{stem}.safetensors")
        return
    names = [f"{stem}-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    weight_map = {tensor: names[place] for tensor, place in sorted(places.items())}
    write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _groups(
    model: nn.Module, backend: Backend, dtype: torch.dtype, layers: Collection[str], export: Export
) -> Iterator[dict[str, torch.Tensor | Deferred]]:
    for path in layers:
        layer = model.get_submodule(path)
        if path in export.plain:
            shape = backend.weight_shape(layer)
            make = partial(_dequantized, layer, backend, dtype)
            yield {f"{path}.weight": Deferred(shape, dtype, make)}
        else:
            yield {f"{path}.{name}": tensor for name, tensor in backend.pack(layer).tensors.items()}
    for name, tensor in own_tensors(model, layers):
        yield {name: tensor}


def _dequantized(layer: nn.Module, backend: Backend, dtype: torch.dtype) -> torch.Tensor:
    return backend.dequantize(layer).to(dtype)


def _size(tensors: Mapping[str, torch.Tensor | Deferred]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, too."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
