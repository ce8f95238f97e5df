"""Whether a backend can be used here: its packages, and the device."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from packaging.requirements import Requirement

from .backend import Backend, Recipe, Scheme, Value
from .errors import BackendUnavailable, DeviceUnsupported, is_out_of_memory, one_sentence
from .requirements import missing, why_not_installed

# diffusers imports these with its pipelines wherever they are installed, so one that is broken breaks them all.
_IMPORTED_BY_DIFFUSERS = ("bitsandbytes", "torchao", "gguf")
_NOISY = (
    "bitsandbytes",
    "sdnq",
    "torchao",
    "torch.utils._pytree",
)  # loggers that warn of nothing at import
_IMPORT_NAMES = {
    "auto-round": "auto_round",
    "mslk-cuda": "mslk",
    "optimum-quanto": "optimum.quanto",
    "protobuf": "google.protobuf",
}


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Warnings off: what a user has to know of a library's state, the engine says itself."""
    found = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in found]
    for logger in found:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(found, levels, strict=True):
            logger.setLevel(level)


def ensure_available(
    backend: Backend, scheme: Scheme | None = None, options: Mapping[str, Value] = MappingProxyType({})
) -> None:
    """Check that the packages of the backend, of the scheme and of what was chosen are there and import.

    Raises:
        BackendUnavailable: they are missing, too old or broken; the message is the install line.
    """
    what, more = backend.name, scheme.requires if scheme else ()
    if more:
        what = f"{backend.name}/{scheme.name}"
    for option in backend.options if scheme else ():
        chosen = options.get(option.name)
        if option.read_by(scheme.name) and (own := option.requires.get(chosen)):
            what, more = f"{backend.name}/{scheme.name} with {option.name} {chosen}", more + own
    ensure_packages(what, backend.requires + more)


def ensure_packages(what: str, requires: tuple[str, ...]) -> None:
    """Check that the pip requirements are met and import; `what` needs them.

    Raises:
        BackendUnavailable: they are missing, too old or broken; the message is the install line.
    """
    if lacking := missing(requires):
        raise BackendUnavailable(f"{what} needs: pip install {' '.join(map(repr, lacking))}")
    import_diffusers()  # which some backends import themselves, less quietly
    for requirement in requires:
        name = Requirement(requirement).name
        if cause := _broken(_IMPORT_NAMES.get(name, name)):
            raise BackendUnavailable(
                f"{what} is installed but does not import ({cause}); repair it: "
                f"pip install --force-reinstall --no-deps {requirement!r}"
            )


@cache
def _broken(module: str) -> str:
    """Why an installed module does not import, or nothing. Asked once: a failed import is not repeatable."""
    kernels = sys.modules.get("kernels")
    if module == "bitsandbytes":
        # On some processors bitsandbytes uses this package to download native code while it is imported.
        sys.modules["kernels"] = None
    try:
        with quiet(*_NOISY):
            importlib.import_module(module)
        return ""
    except Exception as error:  # whatever a broken package raises is the answer
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {one_sentence(error)}"
    finally:
        if kernels is not None:
            sys.modules["kernels"] = kernels
        elif "kernels" in sys.modules and sys.modules["kernels"] is None:
            del sys.modules["kernels"]


@cache
def shield_diffusers() -> None:
    """Hide backends that are broken from diffusers, which otherwise cannot import a single pipeline."""
    for name in _IMPORTED_BY_DIFFUSERS:
        if importlib.util.find_spec(name) is None or not _broken(name):
            continue
        for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
            del sys.modules[loaded]
        sys.modules[name] = None  # the import system's own way to say: not installed
        flags = sys.modules.get("diffusers.utils.import_utils")
        if flags is not None:  # imported before us, and has already looked
            setattr(flags, f"_{name}_available", False)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Advice and progress bars of diffusers and transformers off."""
    shield_diffusers()
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    bars = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in bars:
        library.disable_progress_bar()
    try:
        with quiet("diffusers", "transformers", "accelerate", *_NOISY):
            yield
    finally:
        for library in bars:
            library.enable_progress_bar()


@cache
def import_diffusers() -> Any:
    """diffusers, with all that importing its pipelines brings in.

    Raises:
        BackendUnavailable: it is missing, too old or broken; the message has the install line.
    """
    if why := why_not_installed():
        raise BackendUnavailable(why)
    try:
        with quiet_libraries():
            import diffusers

            diffusers.DiffusionPipeline  # noqa: B018 - resolving the name imports it
    except Exception as error:  # whatever one of its own requirements raises
        if is_out_of_memory(error):
            raise
        cause = str(error.__cause__ or error).strip().splitlines()[-1]
        raise BackendUnavailable(
            f"diffusers does not import ({cause}); repair the package it names with pip install --force-reinstall"
        ) from error
    return diffusers


def ensure_runs(backend: Backend, scheme: Scheme, recipe: Recipe) -> None:
    """Check that the scheme runs on the device, at last by quantizing and running one small layer.

    Raises:
        DeviceUnsupported: it does not.
    """
    what, device = f"{backend.name}/{scheme.name}", recipe.device
    if device.type not in scheme.devices:
        needs = "a CUDA GPU" if scheme.devices == ("cuda",) else " or ".join(scheme.devices)
        if scheme.capability:
            needs += " of compute capability {}.{} or newer".format(*scheme.capability)
        raise DeviceUnsupported(f"{what} needs {needs}; this run is on {device.type}.")
    numbered = device.type == "cuda" and torch.version.hip is None  # AMD's numbers count something else
    if numbered and scheme.capability and torch.cuda.get_device_capability(device) < scheme.capability:
        found = "{}.{}".format(*torch.cuda.get_device_capability(device))
        wanted = "{}.{}".format(*scheme.capability)
        raise DeviceUnsupported(
            f"{what} needs a CUDA GPU of compute capability {wanted} or newer; this one has {found}."
        )
    try:
        with torch.inference_mode(False), torch.no_grad(), quiet_libraries():
            layer = torch.nn.Linear(256, 256, device=device, dtype=recipe.dtype)
            backend.quantize(layer, recipe)(torch.zeros(16, 256, device=device, dtype=recipe.dtype))
    except Exception as error:  # a backend may raise anything for a device it does not know
        if is_out_of_memory(error):
            raise
        raise DeviceUnsupported(f"{what} does not run on {device.type} here: {one_sentence(error)}.") from error
