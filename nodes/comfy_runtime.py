"""ComfyUI's folders, node classes and prompts. Beside this one only comfy_memory and comfy_progress talk to it."""

from __future__ import annotations

import os
import re
import reprlib
import textwrap
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io, ui

from ..quant_core import DEMO, SourceError, SpecError, check_target, default_store

__all__ = [
    "ComfyExtension",
    "file_fingerprint",
    "file_path",
    "files",
    "io",
    "new_pipeline_folder",
    "pipeline_folder",
    "pipeline_fingerprint",
    "pipeline_names",
    "store_folder",
    "ui",
    "why_not_listed",
]

_FILE_FOLDERS = ("diffusion_models", "unet_gguf", "text_encoders", "clip_gguf", "diffusers")
_DEPTH = 4  # folders below a model root that are looked into
_short = reprlib.Repr()
_short.maxstring = 80
_repr = _short.repr  # of what a prompt carries, which can be of any kind and length


def pipeline_names() -> list[str]:
    """The bundled demo and the diffusers pipelines under models/diffusers, as the user sees them."""
    return [DEMO, *sorted(_pipelines())]


def _pipelines() -> dict[str, Path]:
    found = {}
    for root, folder, names in _walk("diffusers"):
        if "model_index.json" in names:
            name = folder.relative_to(root).as_posix()
            found.setdefault(f"./{DEMO}" if name == DEMO else name, folder)
    return found


def _walk(kind: str):
    """(root, folder, file names) of a kind of model folder and of all below it, as deep as models are put."""
    try:
        roots = folder_paths.get_folder_paths(kind)
    except KeyError:  # a kind that only another pack registers
        return
    for root in map(Path, roots):
        for folder, below, names in os.walk(root, followlinks=True):
            path = Path(folder)
            if len(path.relative_to(root).parts) >= _DEPTH:
                below.clear()
            yield root, path, names


def _named(name: str, found: dict[str, Path]) -> Path | None:
    """The path of a listed name, also of one that was written on a system that separates folders otherwise."""
    if not isinstance(name, str):  # a prompt can carry anything
        return None
    return found.get(name) or found.get(name.replace("\\", "/"))


def pipeline_folder(name: str) -> str:
    """The source behind a name of `pipeline_names`. A prompt can carry any text, so it is looked up again.

    Raises:
        SourceError: the name is not listed.
    """
    if name == DEMO:
        return DEMO
    folder = _named(name, _pipelines())
    if folder is None:
        there = textwrap.shorten(", ".join(pipeline_names()), 120, placeholder=" ...")
        raise SourceError(
            f"There is no diffusers pipeline {_repr(name)} under models/diffusers; the ones there: {there}."
        )
    return str(folder)


def why_not_listed(name: str | None) -> str:
    """Why a prompt's pipeline cannot be loaded, empty if it can or is wired and known only when it runs."""
    try:
        if name is not None:
            pipeline_folder(name)
        return ""
    except SourceError as error:
        return str(error)


def new_pipeline_folder(name: str) -> Path:
    """Where a pipeline of that name is saved, so that `pipeline_names` lists it.

    Raises:
        SpecError: it is no plain name, or there is something of that name.
    """
    if not re.fullmatch(r"\w[\w .+-]*(?<![ .])", name):
        raise SpecError(
            f"name is {_repr(name)}; it takes the name of a new folder, of letters, digits, spaces and . + - _"
        )
    root = Path(folder_paths.get_folder_paths("diffusers")[0])
    root.mkdir(parents=True, exist_ok=True)
    check_target(root / name)
    return root / name


def pipeline_fingerprint(name: str) -> list:
    """What changes when the files of a pipeline do: their names, sizes and times."""
    if name == DEMO:
        return [DEMO]
    files = sorted(path for path in Path(pipeline_folder(name)).rglob("*") if path.is_file())
    return [_told(path) for path in files]


def files(suffix: str) -> list[str]:
    """The names of model files with a suffix, as the user sees them."""
    return sorted(_files(suffix))


def _files(suffix: str) -> dict[str, Path]:
    found = {}
    for kind in _FILE_FOLDERS:
        for root, folder, names in _walk(kind):
            for name in names:
                if name.lower().endswith(suffix):
                    found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return found


def file_path(name: str, suffix: str) -> str:
    """The path behind a name of `files`.

    Raises:
        SourceError: the name is not listed.
    """
    found = _named(name, _files(suffix))
    if found is None:
        raise SourceError(
            f"There is no {suffix} file {_repr(name)} in ComfyUI's model folders; put it into models/unet."
        )
    return str(found)


def file_fingerprint(name: str, suffix: str) -> list:
    """What changes when a model file does: its path, size and time; the name alone where there is none."""
    found = _named(name, _files(suffix))
    return list(_told(found)) if found else [name]


def _told(path: Path) -> tuple:
    """What tells a file from another; its last change is noted by the system, whatever time it was given."""
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns, about.st_ctime_ns


def store_folder() -> Path:
    """Where quantized components are kept: as QUANTIZED_DIFFUSERS_STORE says, else the folder for them among the model
    folders, which extra_model_paths.yaml can put elsewhere."""
    if os.environ.get("QUANTIZED_DIFFUSERS_STORE"):
        return default_store()
    try:
        return Path(folder_paths.get_folder_paths("quantized_diffusers")[0])
    except (KeyError, IndexError):  # nobody put it elsewhere
        return Path(folder_paths.models_dir) / "quantized_diffusers"
