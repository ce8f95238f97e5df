"""The weight files of a component: those that its library reads, and no others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import NamedTuple

from .architecture import is_transformers
from .availability import quiet_libraries
from .errors import SourceError, one_sentence
from .headers import check_headers, tensors_in
from .misplaced import why_none
from .source import ComponentInfo

OWN_STEM = "quantized"  # of files that neither diffusers nor transformers can make anything of


class WeightFiles(NamedTuple):
    """The weight files of one component."""

    files: list[Path]
    variant: str | None  # whose they are
    index: Path | None  # which names them, where there is one


def weight_files(info: ComponentInfo, variant: str | None = None) -> WeightFiles:
    """The safetensors files of a component, every header checked against its file.

    As in diffusers, a component that has no weights of the variant comes in its plain form.

    Raises:
        SourceError: there are none, one is truncated or damaged, or the shard index leaves the folder or is not of
            its shards.
    """
    if not info.folder.is_dir():
        raise SourceError(f"{info.name} is named in model_index.json, but the pipeline has no folder {info.name}.")
    if is_transformers(info.cls) and (info.folder / "adapter_config.json").exists():
        raise SourceError(
            f"{info.name} has an adapter_config.json, whose adapter transformers would put on it; move it elsewhere."
        )
    variant = variant if variant and has_variant(info, variant) else None
    found = _find(info, variant)
    if variant and (old := _old_index(info, variant)) and (found is None or found.suffix != ".json"):
        found = _check_found(info, old, variant)
    if found is None:
        raise SourceError(why_none(info, library_stem(info)))
    if found.suffix != ".json":
        check_headers(info.name, [found])
        return WeightFiles([found], variant, None)
    weight_map = _weight_map(info.name, found)
    files = [found.parent / name for name in sorted(set(weight_map.values()))]
    check_headers(info.name, files)
    if not is_transformers(info.cls):  # diffusers trusts the index
        _check_index(info.name, found, weight_map, files)
    return WeightFiles(files, variant, found)


def has_variant(info: ComponentInfo, variant: str) -> bool:
    """Whether a component has weights of a variant."""
    return bool(_find(info, variant) or _old_index(info, variant))


def _old_index(info: ComponentInfo, variant: str) -> Path | None:
    """An index as diffusers 0.28 to 0.30 named it."""
    old = info.folder / f"{library_stem(info)}.safetensors.{variant}.index.json"
    return old if old.is_file() else None


def _check_found(info: ComponentInfo, old: Path, variant: str) -> Path:
    """An index of an old name, if its library finds it: what diffusers looks for depends on the dots in the path.

    Raises:
        SourceError: it does not.
    """
    if not is_transformers(info.cls):
        from diffusers.models.model_loading_utils import _fetch_index_file_legacy as fetch

        asked = {"is_local": True, "pretrained_model_name_or_path": info.folder, "use_safetensors": True}
        with quiet_libraries():
            if fetch(**dict.fromkeys(signature(fetch).parameters) | asked | {"variant": variant}) == old:
                return old
    new = f"{library_stem(info)}.safetensors.index.{variant}.json"
    way = f"load it without variant={variant!r}" if _find(info, None) else f"rename it to {new}"
    raise SourceError(f"{info.name} has a shard index of an old name, {old.name}, which is not found there; {way}.")


def library_stem(info: ComponentInfo) -> str:
    """How the names of a component's weight files begin."""
    return "model" if is_transformers(info.cls) else "diffusion_pytorch_model"


def _find(info: ComponentInfo, variant: str | None) -> Path | None:
    """The one file or the shard index that a component's library reads."""
    return next((path for path in _candidates(info, variant) if path.is_file()), None)


def _candidates(info: ComponentInfo, variant: str | None) -> Iterator[Path]:
    """Where there is both, transformers takes the file and diffusers the index, as their `from_pretrained` do; a
    config of transformers may name either. A last resort are our own names."""
    tag, stem = f".{variant}" if variant else "", library_stem(info)
    names = [f"{stem}.safetensors.index{tag}.json", f"{stem}{tag}.safetensors"]
    if is_transformers(info.cls):
        named = info.config.get("transformers_weights")
        if named is not None and not _is_plain(named, (".safetensors", ".safetensors.index.json")):
            raise SourceError(f"{info.name}: its config.json names {named!r}, which is no safetensors file beside it.")
        names = names[::-1] if named is None else [named]
    if not variant:
        names += [f"{OWN_STEM}.safetensors.index.json", f"{OWN_STEM}.safetensors"]
    yield from (info.folder / name for name in names)


def _is_plain(name: object, endings: tuple[str, ...]) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(endings)


def _weight_map(name: str, index: Path) -> dict[str, str]:
    """Tensor -> file of a shard index, each of which is there."""
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
        weight_map, _ = data["weight_map"], data["metadata"].keys()  # both libraries read both
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise SourceError(f"{name}: the shard index {index.name} is damaged ({one_sentence(error)}).") from None
    for file in files:
        if not _is_plain(file, (".safetensors",)):
            raise SourceError(f"{name}: the shard index names {file!r}, which is no safetensors file of its folder.")
        if not (index.parent / file).is_file():
            raise SourceError(f"{name}: the shard {file} is missing; download the model again.")
    return weight_map


def _check_index(name: str, index: Path, weight_map: dict[str, str], files: list[Path]) -> None:
    held = {tensor: stored.file.name for tensor, stored in tensors_in(files).items()}
    wrong = sorted(tensor for tensor, _ in held.items() ^ weight_map.items())
    if wrong:
        raise SourceError(
            f"{name}: {index.name} is not of its shards, which differ in where {wrong[0]} is; "
            "download the model again."
        )
