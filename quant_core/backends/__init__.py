"""The registry: every module in this folder that is not private defines one BACKEND."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from ..backend import Backend
from ..errors import SpecError, choices, did_you_mean


@cache
def backends() -> dict[str, Backend]:
    """All backends by name, whether or not their packages are installed."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    found = [importlib.import_module(f".{name}", __name__).BACKEND for name in names]
    return {backend.name: backend for backend in found}


def get_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        SpecError: there is none.
    """
    try:
        return backends()[name]
    except KeyError:
        hint = did_you_mean(name, backends())
        raise SpecError(f"Unknown backend {name!r}{hint}; use one of: {choices(backends())}.") from None
