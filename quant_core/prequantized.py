"""Checkpoints that are quantized already: who reads them, and whether that works here."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from .architecture import is_transformers
from .availability import ensure_available, ensure_packages, import_diffusers, quiet_libraries
from .backends import backends, get_backend
from .checkpoint import OWN_STEM, WeightFiles
from .errors import DeviceUnsupported, SourceError, is_out_of_memory, one_sentence
from .source import ComponentInfo
from .specs import QuantSpec

_ANOTHER_WAY = "load the checkpoint that it was made from"


class _Method(NamedTuple):
    """A quantization method that no backend here has: a plan cannot ask for it, a checkpoint may bring it."""

    requires: tuple[str, ...] = ()  # pip requirements
    needs_gpu: bool = False
    obstacle: str = ""  # why its checkpoints are not read


_METHODS = {
    "auto-round": _Method(("auto-round>=0.13.0",)),
    "modelopt": _Method(obstacle="which keeps its layers in modelopt_state.pth, a pickled file that is not opened"),
    "nunchaku_lite": _Method(("kernels",), needs_gpu=True),
    "sdnq": _Method(("sdnq",)),
}


def own_reader(info: ComponentInfo, files: WeightFiles) -> QuantSpec | None:
    """What a component's checkpoint is, if a backend here reads it without its library. `mixed` of its config is what
    our own files of several schemes have there.

    transformers renames the layers of some checkpoints and reads its own, so it does that but for our own files.
    """
    own = files.files[0].name.startswith(OWN_STEM)
    if is_transformers(info.cls) and not own:
        return None
    return told_spec(info)


def told_spec(info: ComponentInfo) -> QuantSpec | None:
    """What a component's config says its checkpoint is, None if that is not quantized, or in words that no backend
    here reads."""
    config = info.config.get("quantization_config")
    if not isinstance(config, dict):
        return None
    for backend in backends().values():
        if backend.reads and (told := backend.reads(config)):
            return QuantSpec(backend.name, *told, mixed=config.get("mixed") or {})
    return None


def ensure_readable(info: ComponentInfo, files: WeightFiles, dtype: torch.dtype, *, here: bool = True) -> None:
    """Check that a checkpoint that is quantized already can be read; what this machine lacks counts only if `here`.

    Raises:
        SourceError: its library does not read it, or only with files that are not opened.
        BackendUnavailable: the package that reads it is missing, too old or broken; the message is the install line.
        DeviceUnsupported: it takes a GPU, and there is none.
    """
    method = str(info.prequantized)
    what = f"{info.name}'s checkpoint is quantized with {method}, which"
    known = _METHODS.get(method, _Method())
    if known.obstacle:
        raise SourceError(f"{what.removesuffix('which')}{known.obstacle}; {_ANOTHER_WAY}.")
    if not here:
        return
    if spec := own_reader(info, files):
        backend = get_backend(spec.backend)
        for scheme in spec.schemes:
            ensure_available(backend, backend.scheme(scheme))
        return
    if known.needs_gpu and not torch.cuda.is_available():
        raise DeviceUnsupported(f"{what} needs an NVIDIA GPU; {_ANOTHER_WAY}.")
    of_backend = [backend.requires for backend in backends().values() if backend.name.startswith(method)]
    # Imported, too: transformers learns of sdnq from its import, and would take such weights for plain ones.
    ensure_packages(what, of_backend[0] if of_backend else known.requires)
    _ask_library(info, dtype, what)


def _ask_library(info: ComponentInfo, dtype: torch.dtype, what: str) -> None:
    """The library's own check, which it makes when it loads the component; transformers ignores methods it does not
    know, and loads their packed weights as plain ones."""
    arguments: dict[str, object] = {"device_map": None}
    if is_transformers(info.cls):
        import transformers as library
        from transformers.quantizers import AutoHfQuantizer as Quantizer

        arguments["weights_only"] = True
    else:
        library = import_diffusers()
        from diffusers.quantizers import DiffusersAutoQuantizer as Quantizer

        arguments["torch_dtype"] = dtype
    try:
        with quiet_libraries():
            config = copy.deepcopy(info.config["quantization_config"])
            Quantizer.from_config(config, pre_quantized=True).validate_environment(**arguments)
    except Exception as error:  # whatever a quantizer raises of a config or a machine that it cannot take
        if is_out_of_memory(error):
            raise
        why = one_sentence(error).partition(" - supported types")[0]
        version = f"{library.__name__} {library.__version__}"
        raise SourceError(f"{what} {version} does not read here ({why}); {_ANOTHER_WAY}.") from error
