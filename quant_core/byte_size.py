"""A number of bytes as text."""

from __future__ import annotations

import re
import reprlib

from .errors import SpecError

_UNITS = {"m": 2**20, "mib": 2**20, "mb": 10**6, "g": 2**30, "gib": 2**30, "gb": 10**9}


def parse_size(text: str, what: str, unit: str = "", also: str = "") -> int:
    """Bytes, from a size as 8GiB. `what` was given it; `unit` is that of a bare number, which else is refused; `also`
    is what else may be given, for the error to say.

    Raises:
        SpecError: the text is no size, or lacks a unit.
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,20})?) ?(G|GB|GiB|M|MB|MiB)?", text.strip(), re.IGNORECASE | re.ASCII)
    if not found:
        raise SpecError(f"{what} is {reprlib.repr(text)}; it takes a size in G, GB, GiB, M, MB or MiB, as 8GiB{also}.")
    if not (found[2] or unit):
        raise SpecError(f"{what} is {reprlib.repr(text)}, which has no unit; write {found[1]}GiB or {found[1]}MiB.")
    return int(float(found[1]) * _UNITS[(found[2] or unit).lower()])
