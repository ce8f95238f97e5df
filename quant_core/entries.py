"""What the store keeps of a quantized component: its key, and its weights in files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.requirements import Requirement
from torch import nn

from .allocator import give_back
from .architecture import empty_model
from .backend import Backend, Packed, Recipe
from .backends import get_backend
from .checkpoint import WeightFiles
from .container import read_tensors, write_tensors
from .digests import checksum
from .layers import quantized_layers, stored_sizes
from .manifest import Key
from .packed import all_tensors, fill
from .reading import cast
from .source import ComponentInfo
from .specs import QuantSpec
from .store import Entry

Tell = Callable[[int, int], None]

_FILE_BYTES = 128 * 2**20  # of an entry's file, of which as much is held while it is made
_WRITER = 3  # counts changes of what is written for the same key


class Job(NamedTuple):
    """A component and how it is to be quantized."""

    source: str  # the name of its pipeline
    info: ComponentInfo
    spec: QuantSpec
    dtype: torch.dtype
    device: torch.device
    layers: Mapping[str, Recipe]
    files: WeightFiles
    made: list[nn.Module]  # the component without its weights, as long as nobody took it

    def empty(self) -> nn.Module:
        """The component without its weights."""
        return self.made.pop() if self.made else empty_model(self.info, self.dtype)

    @property
    def backend(self) -> Backend:
        """Of its spec."""
        return get_backend(self.spec.backend)


def entry_key(job: Job, memory: Path, check: Callable[[], None]) -> Key:
    """All that the bytes of a quantized component depend on. Weights count by all bytes of their files, whose
    checksums are kept in the folder `memory`; `check` is called while they are made, and may raise to stop.

    Raises:
        StoreError: as `checksum` says.
    """
    info, spec = job.info, job.spec
    library = "transformers" if info.library == "transformers" else "diffusers"
    names = {"torch", library, *(Requirement(text).name for text in job.backend.requires)}
    config = b"".join((part.folder / "config.json").read_bytes() for part in info.parts or (info,))
    device = job.device.type
    if device == "cuda":
        device += " {}.{}".format(*torch.cuda.get_device_capability(job.device))
    # A layer that is quantized as the spec is at large has its name alone.
    other = {name: f" {recipe.scheme}" for name, recipe in job.layers.items() if recipe.scheme != spec.scheme}
    content = {
        "writer": _WRITER,
        "class": info.class_name,
        "config": _hash(config),
        "weights": [checksum(file, memory, check) for file in job.files.files],
        "backend": spec.backend,
        "scheme": spec.scheme,
        "options": dict(spec.options),
        "layers": _hash("\n".join(name + other.get(name, "") for name in job.layers).encode()),
        "dtype": str(job.dtype).removeprefix("torch."),
        "device": device,
        "versions": {name: metadata.version(name) for name in sorted(names)},
    }
    about = {
        "what": f"{info.name} of {job.source}, quantized as {spec}",
        "component": info.name,
        "source": job.source,
        "skip_modules": list(spec.skip_modules),
        "mixed": [f"{scheme}={pattern}" for pattern, scheme in spec.mixed.items()],
        "quantized_layers": len(job.layers),
    }
    return Key(f"{info.class_name}-{spec.backend}-{spec.scheme}", content, about)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def entry_bytes(model: nn.Module, job: Job) -> int:
    """Bytes that the entry will take, but for names."""
    packed = {id(model.get_submodule(name).weight) for name in job.layers}
    rest = sum(tensor.numel() for tensor in model.parameters() if id(tensor) not in packed)
    return sum(stored_sizes(model, job.layers, job.backend).values()) + rest * job.dtype.itemsize


def write_entry(folder: Path, model: nn.Module, job: Job, tell: Tell) -> None:
    files = _Files(folder)
    for name, layer in quantized_layers(model, job.layers, job.backend, tell):
        files.add_layer(name, job.backend.pack(layer))
        left = nn.Linear(layer.in_features, layer.out_features, False, device="meta")
        left.bias = layer.bias
        model.set_submodule(name, left)
        del layer
    cast(model, job.dtype)
    for name, tensor in all_tensors(model):
        if not tensor.is_meta:
            files.add(name, tensor)
    files.close()


class _Files:
    """Writes the tensors of an entry into files of bounded size, each with what its layers need in its metadata."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        self.names: dict[int, tuple[str, torch.Tensor]] = {}  # of the plain tensors, which are kept, so that ids are
        self._begin()

    def _begin(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.layers: dict[str, dict] = {}
        self.same: dict[str, str] = {}  # another name of a shared tensor -> its name
        self.size = 0

    def add_layer(self, path: str, packed: Packed) -> None:
        self.layers[path] = {"tensors": list(packed.tensors), "about": packed.about}
        for name, tensor in packed.tensors.items():
            self._add(f"{path}.{name}", tensor)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if id(tensor) in self.names:
            self.same[name] = self.names[id(tensor)][0]
        else:
            self.names[id(tensor)] = name, tensor
            self._add(name, tensor)

    def _add(self, name: str, tensor: torch.Tensor) -> None:
        self.tensors[name] = tensor
        self.size += tensor.numel() * tensor.element_size()
        if self.size >= _FILE_BYTES:
            self.close()

    def close(self) -> None:
        if self.tensors or self.same:
            self.count += 1
            about = {"layers": json.dumps(self.layers), "same": json.dumps(self.same)}
            write_tensors(self.folder / f"weights-{self.count:05}.safetensors", self.tensors, about)
            self._begin()
            give_back()


def read_entry(job: Job, entry: Entry) -> nn.Module:
    """The component that an entry holds, memory-mapped.

    Raises:
        StoreError: it is damaged or lacks a weight.
    """
    backend = job.backend
    if backend.load:
        return backend.load(job.info, job.empty(), job.dtype, job.layers, entry.files[0], lambda done, total: None)
    model = job.empty()
    tensors, layers, same = {}, {}, {}
    for file in entry.files:
        found, about = read_tensors(file)
        tensors |= found
        layers |= json.loads(about["layers"])
        same |= json.loads(about["same"])
    packed = {
        path: Packed({name: tensors.pop(f"{path}.{name}") for name in layer["tensors"]}, layer["about"])
        for path, layer in layers.items()
    }
    return fill(model, backend, job.layers, packed, tensors, same)
