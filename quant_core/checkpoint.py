"""The weight files of a component: which they are, and whether they are what they say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .errors import SourceError, one_sentence

OWN_STEM = "quantized"  # of files that neither diffusers nor transformers can make anything of
_STEMS = ("diffusion_pytorch_model", "model", OWN_STEM)  # as diffusers and transformers name them
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")


class WeightFiles(NamedTuple):
    """The weight files of one component."""

    files: list[Path]
    variant: str | None  # whose they are


def weight_files(name: str, folder: Path, variant: str | None = None) -> WeightFiles:
    """The safetensors files of a component, every header checked against its file.

    As in diffusers, a component that has no weights of the variant comes in its plain form.

    Raises:
        SourceError: there are none, one is truncated or damaged, or the shard index leaves the folder.
    """
    if not folder.is_dir():
        raise SourceError(f"{name} is named in model_index.json, but the pipeline has no folder {name}.")
    variant = variant if variant and has_variant(folder, variant) else None
    index, single = _find(folder, variant)
    if index:
        return WeightFiles(_checked(name, _shards(name, index)), variant)
    if single:
        return WeightFiles(_checked(name, [single]), variant)
    raise SourceError(_why_none(name, folder))


def shard_index(folder: Path, variant: str | None) -> Path | None:
    """The index of a component in several files."""
    return _find(folder, variant)[0]


def has_variant(folder: Path, variant: str) -> bool:
    """Whether a component has weights of a variant."""
    return any(_find(folder, variant))


def _find(folder: Path, variant: str | None) -> tuple[Path | None, Path | None]:
    """The shard index, or the single file."""
    tag = f".{variant}" if variant else ""
    for stem in _STEMS:
        for index in (folder / f"{stem}.safetensors.index{tag}.json", folder / f"{stem}{tag}.safetensors.index.json"):
            if index.is_file():
                return index, None
        if (single := folder / f"{stem}{tag}.safetensors").is_file():
            return None, single
    return None, None


def _why_none(name: str, folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if others:
        variants = sorted({path.split(".")[-2] for path in others if path.count(".") == 2})
        say = f"ask for variant={variants[0]!r}" if variants else f"they should be named {_STEMS[1]}.safetensors"
        return f"{name} has no plain weights but {', '.join(others)}; {say}."
    if pickles:
        return (
            f"{name} has only pickled weights ({pickles[0]}), which can run code when they are opened; "
            "convert them to safetensors."
        )
    return f"{name} has no weights: its folder holds no safetensors file."


def _shards(name: str, index: Path) -> list[Path]:
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SourceError(f"{name}: the shard index {index.name} is damaged ({one_sentence(error)}).") from None
    for file in files:
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise SourceError(f"{name}: the shard index names {file!r}, which is no safetensors file of its folder.")
        if not (index.parent / file).is_file():
            raise SourceError(f"{name}: the shard {file} is missing; download the model again.")
    return sorted(index.parent / file for file in files)


def header(file: Path) -> bytes:
    """The JSON header of a safetensors file whose header was checked (safetensors' README, Format)."""
    with file.open("rb") as stream:
        return stream.read(int.from_bytes(stream.read(8), "little"))


def stored_bytes(files: Iterable[Path]) -> int:
    """Bytes of the tensors in safetensors files."""
    return sum(file.stat().st_size - 8 - len(header(file)) for file in files)


def stored_dtypes(files: Iterable[Path]) -> set[str]:
    """The dtypes of the tensors in safetensors files, as the format writes them: F32, BF16, I64, ..."""
    tensors = (entry for file in files for name, entry in json.loads(header(file)).items() if name != "__metadata__")
    return {entry["dtype"] for entry in tensors}


def _checked(name: str, files: list[Path]) -> list[Path]:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{name}: {file.name} is truncated or not what its header says ({one_sentence(error)}); "
                "download it again."
            ) from None
    return files
