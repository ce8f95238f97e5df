"""Why a component has no weights that its library reads, and what would give it some."""

from __future__ import annotations

import re
from pathlib import Path

from .accounting import check_tensors
from .architecture import empty_model
from .errors import SourceError
from .headers import check_headers, tensors_in
from .source import ComponentInfo

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_SHARD = re.compile(r"(.+?)(\.[\w-]+)?-\d{5}-of-(\d{5})(\.[\w-]+)?\.safetensors")


def why_none(info: ComponentInfo, stem: str) -> str:
    """The sentence on a component of which its library, which looks for `stem`.safetensors, finds no weights."""
    names = sorted(path.name for path in info.folder.iterdir())
    files = [name for name in names if name.lower().endswith(".safetensors")]
    variants = re.compile(rf"{stem}\.(?:safetensors\.index\.)?(?!safetensors\.)([\w-]+)\.(?:safetensors|json)")
    for name in names:
        if "-of-" not in name and (match := variants.fullmatch(name)):
            return f"{info.name} has no plain weights but {', '.join(files)}; ask for variant={match[1]!r}."
    if shards := [match for match in map(_SHARD.fullmatch, files) if match]:
        count, index = int(shards[0][3]), f"{stem}.safetensors.index.json"
        return (
            f"{info.name} has {len(shards)} of {count} shards ({shards[0][0]}) and no {index}, which says what is in "
            "which; download what is missing."
        )
    if files:
        return f"{info.name} has no {stem}.safetensors but {', '.join(files)}; {_advice(info, files, stem)}."
    if packed := [name for name in names if name.lower().endswith(".gguf")]:
        return f"{info.name} has {', '.join(packed)} and no safetensors file; name one of them in the plan."
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return (
            f"{info.name} has only pickled weights ({pickles[0]}), which can run code when they are opened; "
            "convert them to safetensors."
        )
    return f"{info.name} has no weights: its folder holds no safetensors file."


def _advice(info: ComponentInfo, files: list[str], stem: str) -> str:
    """Renaming helps where a file has the tensors that the class takes."""
    fitting = [name for name in files if _fits(info, info.folder / name)]
    if len(fitting) == 1:
        return f"rename {fitting[0]} to {stem}.safetensors"
    if fitting:
        return f"rename the one that is meant to {stem}.safetensors"
    return f"these are not what {info.class_name} reads, so download the {info.name} of a diffusers pipeline"


def _fits(info: ComponentInfo, file: Path) -> bool:
    try:
        check_headers(info.name, [file])
        tensors, model = tensors_in([file]), empty_model(info)
        if not info.prequantized:
            check_tensors(info, model, tensors, False)
    except SourceError:
        return False
    return 2 * len(tensors) >= len(model.state_dict())
