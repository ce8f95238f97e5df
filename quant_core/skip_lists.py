"""The layers of each architecture that had better stay in 16 bit where weights get fewer than 8: skip_lists.json.

That file maps the class of a component to `skip`, patterns as `QuantSpec.skip_modules` takes them, and `source`, where
they come from; `share` is that of the weights of linear layers which they keep, and a `note` may say more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from .backends import get_backend
from .errors import QuantError
from .specs import RECOMMENDED, QuantSpec

_FILE = Path(__file__).with_suffix(".json")
_KEYS = {"skip", "source", "share", "note"}


def recommended(class_name: str) -> tuple[str, ...]:
    """The skip patterns for components of a class, of which a variant may lack the modules; none if it has no list."""
    return _lists().get(class_name, ())


def with_patterns(spec: QuantSpec, class_name: str) -> QuantSpec:
    """The spec for a component of a class, with its skip patterns written out."""
    few_bits = 0 < get_backend(spec.backend).scheme(spec.scheme).bits < 8  # of 0 bits is what a file decides
    written = ((RECOMMENDED,) if few_bits else ()) if spec.skip_modules is None else spec.skip_modules
    each = (recommended(class_name) if pattern == RECOMMENDED else (pattern,) for pattern in written)
    return replace(spec, skip_modules=tuple(dict.fromkeys(chain(*each))))


@cache
def _lists() -> dict[str, tuple[str, ...]]:
    return read_lists(json.loads(_FILE.read_text(encoding="utf-8")))


def read_lists(data: Any) -> dict[str, tuple[str, ...]]:
    """Class to skip patterns, of what such a file holds.

    Raises:
        QuantError: it is not as described above.
    """
    if not isinstance(data, dict):
        raise QuantError(f"{_FILE.name} must be an object: class of a component to skip and source.")
    for name, entry in data.items():
        if not isinstance(entry, dict) or not {"skip", "source"} <= entry.keys() <= _KEYS:
            raise QuantError(f"{name} in {_FILE.name} must be an object of skip, source, share and note.")
        skip, source = entry["skip"], entry["source"]
        words = [*skip, source] if isinstance(skip, list) and skip else [None]
        if not all(isinstance(word, str) and word.strip() for word in words) or len({*skip}) < len(skip):
            raise QuantError(f"{name} in {_FILE.name} needs skip, a list of different patterns, and source, a text.")
    return {name: tuple(entry["skip"]) for name, entry in data.items()}
