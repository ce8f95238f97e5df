"""What a pipeline folder contains, read and distrusted without loading a weight."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, count, takewhile
from pathlib import Path
from typing import Any

from torch import nn

from .classes import component_class, components_of, is_several, pipeline_class, settings_of
from .errors import SourceError
from .json_file import read_json
from .locating import BUNDLED, DEMO


@dataclass(frozen=True)
class ComponentInfo:
    """A component as model_index.json names it."""

    name: str
    library: str  # diffusers, transformers, or the diffusers pipeline module that defines its class
    class_name: str
    folder: Path

    @cached_property
    def cls(self) -> type:
        """Its class.

        Raises:
            SourceError, BackendUnavailable: as `component_class` says.
        """
        return component_class(self.name, self.library, self.class_name)

    @property
    def has_weights(self) -> bool:
        """Whether it is a model, and not a scheduler, tokenizer, processor or guider."""
        return issubclass(self.cls, nn.Module)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its config.json.

        Raises:
            SourceError: there is none, or it is no JSON object.
        """
        return read_json(self.folder / "config.json", f"component {self.name} of this pipeline")

    @cached_property
    def parts(self) -> tuple[ComponentInfo, ...]:
        """The models that it is made of, if it is several: in its folder, and those of its name with _1, _2, ...

        Raises:
            SourceError: a config names no class.
        """
        if not is_several(self.cls):
            return ()
        further = (self.folder.with_name(f"{self.folder.name}_{number}") for number in count(1))
        parts = []
        for folder in chain([self.folder], takewhile(Path.is_dir, further)):
            config = read_json(folder / "config.json", f"component {folder.name} of this pipeline")
            parts.append(ComponentInfo(folder.name, self.library, str(config.get("_class_name")), folder))
        return tuple(parts)

    @property
    def gguf_file(self) -> Path | None:
        """The one .gguf file that its folder holds in place of safetensors."""
        if self.parts or not self.folder.is_dir():
            return None
        files = list(self.folder.iterdir())
        packed = [path for path in files if path.suffix.lower() == ".gguf"]
        return packed[0] if len(packed) == 1 and not any(path.suffix == ".safetensors" for path in files) else None

    @property
    def prequantized(self) -> str | None:
        """The method its checkpoint is quantized with already, or None."""
        if self.parts:
            return next((method for part in self.parts if (method := part.prequantized)), None)
        if self.gguf_file:
            return "gguf"
        config = self.config.get("quantization_config")
        return str(config.get("quant_method", "an unknown method")) if isinstance(config, dict) else None


@dataclass(frozen=True)
class PipelineIndex:
    """A pipeline folder: its class and its components."""

    folder: Path
    class_name: str
    named: dict[str, ComponentInfo]  # whatever model_index.json names
    absent: frozenset[str]  # optional components this pipeline comes without
    values: dict[str, Any] = field(default_factory=dict)  # what it says beside components

    @cached_property
    def cls(self) -> type:
        """Its class.

        Raises:
            SourceError, BackendUnavailable: as `pipeline_class` says.
        """
        return pipeline_class(self.class_name)

    @cached_property
    def components(self) -> dict[str, ComponentInfo]:
        """Those that its class takes."""
        takes = components_of(self.cls)
        return {name: info for name, info in self.named.items() if name in takes}

    @property
    def untaken(self) -> list[str]:
        """Those that its class neither takes nor makes itself, which diffusers, too, leaves alone."""
        return sorted(self.named.keys() - self.components.keys() - settings_of(self.cls))

    @property
    def settings(self) -> dict[str, Any]:
        """The values that its class takes beside its components."""
        takes = settings_of(self.cls)
        return {name: value for name, value in self.values.items() if name in takes}

    @property
    def name(self) -> str:
        """As people know it: `demo`, the folder's name, which of another demo is ./demo, or of the hub's cache
        owner/name."""
        if self.is_bundled:
            return DEMO
        cached = re.search(r"models--([^/\\]+)[/\\]snapshots", str(self.folder))
        if cached:
            return cached[1].replace("--", "/", 1)
        return f"./{DEMO}" if self.folder.name == DEMO else self.folder.name

    @property
    def is_bundled(self) -> bool:
        """Whether it is the demo that comes with this package."""
        return self.folder == BUNDLED

    @property
    def models(self) -> dict[str, ComponentInfo]:
        """The components with weights."""
        return {name: info for name, info in self.components.items() if info.has_weights}

    @property
    def text_encoders(self) -> list[str]:
        """The models that read the prompt."""
        return [name for name, info in self.models.items() if _is_text_encoder(info)]

    @property
    def denoisers(self) -> list[str]:
        """The models that are called at each step."""
        return [name for name, info in self.models.items() if _is_denoiser(info)]

    @property
    def default_reach(self) -> list[str]:
        """The models that a plan's default is for: denoisers and text encoders."""
        return [name for name, info in self.models.items() if _is_denoiser(info) or _is_text_encoder(info)]


def _is_denoiser(info: ComponentInfo) -> bool:
    if info.library == "transformers" or re.search(r"VAE|Vae|Autoencoder|VQ|ControlNet", info.class_name):
        return False
    by_name = re.match(r"(transformer|unet|prior|decoder)(_|$)", info.name)
    return bool(by_name or re.search(r"Transformer|UNet|Prior|DiT", info.class_name))


def _is_text_encoder(info: ComponentInfo) -> bool:
    if re.search(r"text_encoder|text_model|language|llm", info.name):
        return True
    other = re.search(r"vision|image|safety|depth|audio|vocoder|speech", f"{info.name} {info.class_name}", re.I)
    return info.library == "transformers" and not other


def read_index(folder: Path) -> PipelineIndex:
    """The index of a pipeline folder.

    Raises:
        SourceError: it is no diffusers pipeline, its index is damaged, or it asks for code of its own.
    """
    what = f"{folder} is not a diffusers pipeline"
    if not (folder / "model_index.json").is_file():
        raise SourceError(f"{what}: it has no model_index.json.")
    index = read_json(folder / "model_index.json", what)
    class_name = index.get("_class_name")
    if isinstance(class_name, list):
        raise SourceError(
            f"{folder} asks for pipeline code of its own ({class_name}); only diffusers' classes are run."
        )
    if not isinstance(class_name, str):
        raise SourceError(f"{what}: its model_index.json names no _class_name.")
    components, absent, values = {}, set(), {}
    for name, value in index.items():
        named = (
            isinstance(value, list)
            and len(value) == 2
            and all(item is None or isinstance(item, str) for item in value)
        )
        if name.startswith("_"):
            continue
        if not isinstance(value, list) or not (named or (folder / name).exists()):
            values[name] = value  # what is no pair of names is a setting of the pipeline
            continue
        if not name.isidentifier():
            raise SourceError(
                f"model_index.json names a component {name!r}; a component's name is a plain folder name."
            )
        if not named:
            raise SourceError(f"model_index.json says {value!r} of component {name}; it takes library and class.")
        if None in value:
            absent.add(name)
        else:
            components[name] = ComponentInfo(name, *value, _place(folder, name))
    return PipelineIndex(folder, class_name, components, frozenset(absent), values)


def _place(folder: Path, name: str) -> Path:
    """Where a component's files are: in a folder of its name or, as of some old models, with the index itself."""
    own = folder / name
    return folder if not own.is_dir() and any(folder.glob("*config.json")) else own
