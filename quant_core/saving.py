"""A loaded pipeline as an ordinary diffusers folder, its components quantized as they are."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import nn

from .architecture import is_transformers
from .availability import quiet_libraries
from .backend import Backend, Export, Recipe
from .backends import get_backend
from .checkpoint import OWN_STEM, WeightFiles, shard_index, stored_bytes, stored_dtypes, weight_files
from .container import DTYPE_NAMES, through, write_tensors
from .errors import SpecError, StoreError, gib, one_sentence
from .inspection import footprint
from .layers import linear_layers
from .packed import own_tensors
from .pipeline import QuantizedPipeline
from .source import ComponentInfo

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]  # bytes written, of all, of which component; raise to stop

_SHARD = 5 * 10**9  # bytes, as transformers and the hub have it
_PAPERS = {".json", ".md", ".txt", ".model", ".jinja", ".tiktoken", ".jpg", ".jpeg", ".png", ".webp", ".gif", ""}
_CHUNK = 16 * 2**20  # bytes that are copied at once
_WEIGHT_INDEX = "*.index*.json"
NOTE = "QUANTIZATION.md"


@dataclass(frozen=True)
class SavedComponent:
    """One component of a saved pipeline."""

    name: str
    quantization: str  # backend/scheme or the method of its checkpoint, "" where it is not quantized
    bytes: int  # of its weights on disk
    obstacle: str  # why its library does not open it and only this engine does, "" where it does
    note: str = ""  # what became different


def save_pipeline(
    pipeline: QuantizedPipeline, folder: Path | str, on_progress: OnProgress | None = None
) -> list[SavedComponent]:
    """Write a pipeline into a folder that is not there yet, which `load_pipeline` and, where its libraries can, plain
    `DiffusionPipeline.from_pretrained` open as it is.

    All is written into a folder beside it, through to the disk, and then renamed. License, model card and whatever
    belongs to the tokenizers come along; QUANTIZATION.md says what was done.

    Raises:
        SpecError: there is something of that name, or nowhere to put it.
        StoreError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists():
        raise SpecError(f"{folder} is there already; name a folder that is not.")
    if not folder.parent.is_dir():
        raise SpecError(f"{folder} cannot be made: its parent is not there; name a folder within one that is.")
    sizes = {name: footprint(model) for name, model in pipeline.models.items()}
    total = sum(sizes.values())
    partial = folder.with_name(f"{folder.name}.partial")
    done = 0

    def tell(written: int, name: str) -> None:
        nonlocal done
        done = min(done + written, total)
        if on_progress:
            on_progress(done, total, name)

    try:
        if (free := shutil.disk_usage(folder.parent).free) < total:
            raise StoreError(f"{folder} takes {gib(total)}, and its disk has {gib(free)} left.")
        shutil.rmtree(partial, ignore_errors=True)
        _copy_papers(pipeline.index.folder, partial)
        saved = []
        with torch.inference_mode(False), torch.no_grad(), quiet_libraries():
            for name, info in pipeline.index.components.items():
                _copy_papers(info.folder, partial / name)
                if info.has_weights:
                    tell(0, name)
                    saved.append(_save(pipeline, info, partial / name, lambda count, name=name: tell(count, name)))
        (partial / NOTE).write_text(_note(pipeline, saved), encoding="utf-8")
        for path in partial.rglob("*"):
            through(path)
        os.replace(partial, folder)
        through(folder.parent)
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{folder} cannot be written ({one_sentence(error)}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    for part in saved:
        if part.obstacle or part.note:
            logger.info("%s: %s", part.name, "; ".join(filter(None, (part.obstacle, part.note))))
    return saved


def _copy_papers(source: Path, folder: Path) -> None:
    """All small files but code, weights and what tells where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if path.is_file() and path.suffix in _PAPERS and not path.match(_WEIGHT_INDEX):
            shutil.copyfile(path, folder / path.name)


def _save(
    pipeline: QuantizedPipeline, info: ComponentInfo, folder: Path, tell: Callable[[int], None]
) -> SavedComponent:
    model, spec = getattr(pipeline.pipe, info.name), pipeline.specs.get(info.name)
    if spec is None:
        _save_plain(pipeline, info, model, folder, tell)
        return SavedComponent(info.name, info.prequantized or "", _bytes(info.name, folder), "")
    backend, recipe = get_backend(spec.backend), Recipe(spec.scheme, spec.options, pipeline.dtype, torch.device("cpu"))
    layers = [path for path, part in model.named_modules() if backend.layer_format(part)]
    config = {name: value for name, value in info.config.items() if name != "quantization_config"}
    if backend.save:
        written = 0

        def passed(done: int, total: int) -> None:
            nonlocal written
            now = round(done / max(total, 1) * footprint(model))
            tell(now - written)
            written = now

        _write_json(folder / "config.json", config)
        backend.save(folder, model, recipe, layers, passed)
        obstacle = "its libraries open a .gguf file alone, not as part of a folder"
        return SavedComponent(
            info.name, str(spec), sum(path.stat().st_size for path in folder.glob("*.gguf")), obstacle
        )
    left_out = [name for name, _ in linear_layers(model) if name not in set(layers)]
    export = backend.export(model, recipe, layers, left_out)
    _write_json(folder / "config.json", config | {"quantization_config": export.config})
    stem = "model" if is_transformers(model) else "diffusion_pytorch_model"
    _write_layers(folder, OWN_STEM if export.obstacle else stem, model, backend, recipe, layers, export, tell)
    note = ""
    if export.plain:
        kept = export.plain[0].rpartition(".")[2]
        note = (
            f"{len(export.plain)} layers ({kept}) are written dequantized, because {info.library} keeps them in 16 bit"
        )
    return SavedComponent(info.name, str(spec), _bytes(info.name, folder), export.obstacle, note)


def _bytes(name: str, folder: Path) -> int:
    return stored_bytes(weight_files(name, folder).files)


def _save_plain(pipeline: QuantizedPipeline, info: ComponentInfo, model: nn.Module, folder: Path, tell: Any) -> None:
    """A component as its checkpoint has it, in the pipeline's dtype."""
    files = weight_files(info.name, info.folder, pipeline.variant)
    floats = {name for name in stored_dtypes(files.files) if name.startswith(("F", "BF"))}
    if info.prequantized or floats == {DTYPE_NAMES[pipeline.dtype]}:
        _copy_weights(info.folder, files, folder, tell)
        return
    model.save_pretrained(folder, safe_serialization=True)
    shutil.copyfile(info.folder / "config.json", folder / "config.json")  # theirs names folders of this machine
    tell(footprint(model))


def _copy_weights(source: Path, files: WeightFiles, folder: Path, tell: Callable[[int], None]) -> None:
    """Weight files under the names that they have without a variant."""
    index = shard_index(source, files.variant)
    tag = f".{files.variant}" if files.variant else ""
    if index:
        shutil.copyfile(index, folder / index.name.replace(tag, ""))
    for path in files.files:
        name = path.name if index else path.name.replace(f"{tag}.safetensors", ".safetensors")
        with path.open("rb") as read, (folder / name).open("wb") as write:
            while part := read.read(_CHUNK):
                write.write(part)
                tell(len(part))


def _write_layers(
    folder: Path,
    stem: str,
    model: nn.Module,
    backend: Backend,
    recipe: Recipe,
    layers: Sequence[str],
    export: Export,
    tell: Callable[[int], None],
) -> None:
    """The component as safetensors under the names that its library gives them, each layer within one file."""
    told = {}
    if backend.metadata:
        about = {path: backend.pack(model.get_submodule(path)).about for path in layers}
        told = backend.metadata(about, [name for name, _ in own_tensors(model, layers)])
    files: list[Path] = []
    places: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}

    def close() -> None:
        files.append(folder / f"{stem}-{len(files) + 1:05}.safetensors")
        places.update(dict.fromkeys(shard, len(files) - 1))
        write_tensors(files[-1], shard, told, tell)
        shard.clear()

    for group in _groups(model, backend, recipe, layers, export):
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
    _write_json(
        folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def _groups(
    model: nn.Module, backend: Backend, recipe: Recipe, layers: Sequence[str], export: Export
) -> Iterator[dict[str, torch.Tensor]]:
    """Tensors by name that have to be in one file."""
    for path in layers:
        layer = model.get_submodule(path)
        if path in export.plain:
            yield {f"{path}.weight": backend.dequantize(layer).to(recipe.dtype)}
        else:
            yield {f"{path}.{name}": tensor for name, tensor in backend.pack(layer).tensors.items()}
    for name, tensor in own_tensors(model, layers):
        yield {name: tensor}


def _size(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _note(pipeline: QuantizedPipeline, saved: Sequence[SavedComponent]) -> str:
    """What was done to the model, for people."""
    index, dtype = pipeline.index, str(pipeline.dtype)
    before = index.folder / NOTE
    used = {"torch", "diffusers", "transformers"}
    for spec in pipeline.specs.values():
        used |= {Requirement(text).name for text in get_backend(spec.backend).requires}
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in sorted(used))
    lines = [
        "# What was done to this model",
        "",
        f"This is `{index.folder.name}`, quantized. License and model card are those of the original, and still hold.",
        "",
        "| component | stored as | bytes | opened by |",
        "|---|---|---|---|",
    ]
    for part in saved:
        readers = "Quantized Diffusers" + ("" if part.obstacle else f", {index.components[part.name].library}")
        lines.append(
            f"| {part.name} | {part.quantization or dtype.removeprefix('torch.')} | {part.bytes} | {readers} |"
        )
    lines += [f"\n- {part.name}: {text}." for part in saved for text in (part.obstacle, part.note) if text]
    lines += ["", f"Made with {versions}.", "", "Quantized Diffusers opens it as it is, without a plan."]
    if not any(part.obstacle for part in saved):
        lines += [
            "So does diffusers:",
            "",
            "```python",
            "import torch",
            f"from diffusers import {index.class_name}",
            "",
            f'pipe = {index.class_name}.from_pretrained("FOLDER", torch_dtype={dtype})',
            "```",
        ]
    if before.is_file():
        lines += [
            "",
            "## Before that",
            "",
            before.read_text(encoding="utf-8").removeprefix(f"{lines[0]}\n\n").rstrip(),
        ]
    return "\n".join(lines) + "\n"
