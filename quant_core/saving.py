"""A loaded pipeline as an ordinary diffusers folder, its components quantized as they are."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import nn

from .availability import quiet_libraries
from .backends import get_backend
from .checkpoint import weight_files
from .container import sync
from .errors import SpecError, StoreError, gib, one_sentence, stoppable, stopping
from .headers import stored_bytes
from .inspection import footprint
from .layers import layer_recipes, linear_layers
from .model_note import NOTE, SavedComponent, model_note
from .pipeline import QuantizedPipeline
from .source import ComponentInfo
from .specs import QuantSpec
from .writing import Tell, copy_weights, write_json, write_plain, write_quantized

logger = logging.getLogger(__name__)

OnProgress = Callable[[int, int, str], None]  # bytes written, of all, of which component; raise to stop

_PAPERS = {".json", ".md", ".txt", ".model", ".jinja", ".tiktoken", ".jpg", ".jpeg", ".png", ".webp", ".gif", ""}
_NOT_OURS = ("quantization_config", "transformers_weights")  # of a config, whose weights are written anew
_MOST = 64 * 2**20  # bytes of such a file
_WEIGHT_INDEX = "*.index*.json"
_INDEX = "model_index.json"


def save_pipeline(
    pipeline: QuantizedPipeline, folder: Path | str, on_progress: OnProgress | None = None
) -> list[SavedComponent]:
    """Write a pipeline into a folder that is not there yet, which `load_pipeline` and, where its libraries can, plain
    `DiffusionPipeline.from_pretrained` open as it is.

    All is written into a hidden folder beside it, through to the disk, and then renamed. License, model card and
    whatever belongs to the tokenizers come along; QUANTIZATION.md says what was done.

    Raises:
        SpecError: there is something of that name, or nowhere to put it.
        StoreError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder).expanduser().absolute()
    check_target(folder)
    for name, spec in pipeline.specs.items():
        if get_backend(spec.backend).save and pipeline.index.models[name].parts:
            raise SpecError(f"{name} is several models, which {spec} has no files for; load it with another plan.")
    if pipeline.index.folder in folder.parents:
        raise SpecError(f"{folder} is inside the model that it is made from; name a folder elsewhere.")
    sizes = {name: footprint(model) for name, model in pipeline.models.items()}
    total = sum(sizes.values())
    if (free := shutil.disk_usage(folder.parent).free) < total:
        raise StoreError(f"{folder} takes {gib(total)}, and its disk has {gib(free)} left.")
    partial = folder.with_name(f".{folder.name}-{token_hex(4)}.partial")
    done = 0
    told = stopping(on_progress)

    def tell(written: int, name: str) -> None:
        nonlocal done
        done = min(done + written, total)
        told(done, total, name)

    with stoppable():
        try:
            partial.mkdir()
            saved = _write(pipeline, partial, tell)
            os.replace(partial, folder)
            sync(folder.parent)
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


def check_target(folder: Path) -> None:
    """Check that a pipeline can be saved as a folder of that name.

    Raises:
        SpecError: there is something of that name, or nowhere to put it.
    """
    folder = folder.absolute()
    if os.path.lexists(folder):
        raise SpecError(f"{folder} is there already; name a folder that is not.")
    if not folder.parent.is_dir():
        raise SpecError(f"{folder} cannot be made, as {folder.parent} is no folder; name a folder within one that is.")
    if not os.access(folder.parent, os.W_OK):
        raise SpecError(f"{folder} cannot be made, as {folder.parent} cannot be written; name a folder elsewhere.")


def _write(pipeline: QuantizedPipeline, folder: Path, tell: Callable[[int, str], None]) -> list[SavedComponent]:
    """All of it, through to the disk; what makes the folder a pipeline comes last."""
    source, saved = pipeline.index.folder, []
    _copy_papers(source, folder)
    with torch.inference_mode(False), torch.no_grad(), quiet_libraries():
        for name, info in pipeline.index.components.items():
            for part, model in _parts(pipeline, info):
                (folder / part.name).mkdir()
                _copy_papers(part.folder, folder / part.name)
                if model is not None:
                    tell(0, name)
                    saved.append(
                        _save(
                            pipeline,
                            part,
                            model,
                            pipeline.specs.get(name),
                            folder / part.name,
                            lambda count, name=name: tell(count, name),
                        )
                    )
    (folder / NOTE).write_text(model_note(pipeline, saved), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)
    shutil.copyfile(source / _INDEX, folder / _INDEX)
    sync(folder / _INDEX)
    sync(folder)
    return saved


def _parts(pipeline: QuantizedPipeline, info: ComponentInfo) -> Iterable[tuple[ComponentInfo, nn.Module | None]]:
    """What of a component has a folder of its own, and the model in there."""
    if not info.has_weights:
        return [(info, None)]
    model = getattr(pipeline.pipe, info.name)
    if not info.parts:
        return [(info, model)]
    (models,) = model.children()  # the list of them
    return zip(info.parts, models, strict=True)


def _copy_papers(source: Path, folder: Path) -> None:
    """Small files but code, weights and what tells where they are; links only within the model and the hub's cache."""
    home = source.resolve()
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        is_license = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        kept = (path.suffix in _PAPERS or is_license) and path.name != _INDEX and not path.match(_WEIGHT_INDEX)
        near = home in path.resolve().parents or path.resolve().parent.name == "blobs"
        if kept and near and path.is_file() and path.stat().st_size <= _MOST:
            shutil.copyfile(path, folder / path.name)


def _save(
    pipeline: QuantizedPipeline,
    info: ComponentInfo,
    model: nn.Module,
    spec: QuantSpec | None,
    folder: Path,
    tell: Tell,
) -> SavedComponent:
    if spec is None:
        _save_plain(pipeline, info, model, folder, tell)
        return SavedComponent(info.name, info.prequantized or "", _bytes(info, folder), "")
    backend = get_backend(spec.backend)
    names = [path for path, part in model.named_modules() if backend.layer_format(part)]
    layers = layer_recipes(model, spec, names, pipeline.dtype, torch.device("cpu"))
    config = _config(pipeline, info)
    if backend.save:
        write_json(folder / "config.json", config)
        backend.save(folder, model, pipeline.dtype, layers, _shares(footprint(model), tell))
        obstacle = "transformers would unpack a .gguf file"
        if hasattr(type(model), "from_single_file"):
            obstacle = f'diffusers opens its .gguf by from_single_file with config="FOLDER/{info.name}" alone'
        elif info.library == "diffusers":
            obstacle = f"diffusers opens no .gguf file as a {info.class_name}"
        size = sum(path.stat().st_size for path in folder.glob("*.gguf"))
        return SavedComponent(info.name, str(spec), size, obstacle)
    left_out = [name for name, _ in linear_layers(model) if name not in layers]
    export = backend.export(model, layers, left_out)
    write_json(folder / "config.json", config | {"quantization_config": export.config})
    write_quantized(folder, model, backend, pipeline.dtype, layers, export, tell)
    note = export.note
    if export.plain:
        names = ", ".join(sorted({path.rpartition(".")[2] for path in export.plain}))
        why = f"because {info.library} keeps them in 16 bit"
        note = f"{len(export.plain)} layers ({names}) are written dequantized, {why}"
    return SavedComponent(info.name, str(spec), _bytes(info, folder), export.obstacle, note)


def _save_plain(pipeline: QuantizedPipeline, info: ComponentInfo, model: nn.Module, folder: Path, tell: Tell) -> None:
    """A component that no plan quantized: as it is or, where its checkpoint quantized it, as that has it."""
    if info.prequantized:
        copy_weights(weight_files(info, pipeline.variant), folder, tell)
        return
    write_plain(folder, model, tell)
    write_json(folder / "config.json", _config(pipeline, info))


def _config(pipeline: QuantizedPipeline, info: ComponentInfo) -> dict[str, Any]:
    """A component's config, of the dtype that it is written in."""
    dtype = str(pipeline.dtype).removeprefix("torch.")
    config = {name: value for name, value in info.config.items() if name not in _NOT_OURS}
    return config | {name: dtype for name in ("dtype", "torch_dtype") if name in config}


def _bytes(info: ComponentInfo, folder: Path) -> int:
    return stored_bytes(weight_files(replace(info, folder=folder)).files)


def _shares(size: int, tell: Tell) -> Callable[[int, int], None]:
    """Tells bytes as the share of the whole grows."""
    told = 0

    def passed(done: int, total: int) -> None:
        nonlocal told
        now = size * done // max(total, 1)
        tell(now - told)
        told = now

    return passed
