"""What a user wrote: JSON, in which everything is said once, numbers, and text files of any editor."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from .errors import SpecError

BYTE_ORDER_MARK = "\ufeff"  # which some editors put first
_NUMBERS = {int: r"[+-]?\d+", float: r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"}


def read_text(path: str | Path) -> str:
    """The text of a file in UTF-8.

    Raises:
        OSError, UnicodeDecodeError: it cannot be read, or is something else.
    """
    return Path(path).read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)


def parse_number(text: str, kind: type[int] | type[float]) -> int | float:
    """The number that a text is in decimal digits. Python would also take 1_000, digits of other scripts, inf and nan.

    Raises:
        ValueError: it is none.
    """
    if not re.fullmatch(_NUMBERS[kind], text.strip(), re.ASCII):
        raise ValueError(f"{text!r} is no number")
    return kind(text)


def check_type(name: str, value: Any, *kinds: type) -> None:
    """See that a value is of one of the types. A truth value is no number.

    Raises:
        SpecError: it is not.
    """
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(kind.__name__.removesuffix("Type") for kind in kinds)
        raise SpecError(f"{name} is {reprlib.repr(value)}; it takes {wanted}.")


def check_whole(what: str, value: int) -> int:
    """The number, if it has at most 64 bits. Python alone could not even print some of the others.

    Raises:
        SpecError: it has more.
    """
    if not -(2**63) <= value < 2**64:
        raise SpecError(f"{what} has a whole number of more than 64 bits, which nothing here takes.")
    return value


def once(what: str, pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """The pairs of `what` as a dict.

    Raises:
        SpecError: a key comes twice.
    """
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if key in found:
            raise SpecError(f"{what} gives {reprlib.repr(key)} twice; give it once.")
        found[key] = value
    return found


def parse_json(what: str, text: str) -> Any:
    """What a JSON text says. `what` names the text in errors.

    Raises:
        SpecError: it is no JSON, gives a key twice, or has a number that nothing takes.
    """

    def whole(digits: str) -> int:
        return check_whole(what, int(digits) if len(digits) < 100 else 2**64)

    def finite(word: str) -> float:
        if not math.isfinite(float(word)):
            raise SpecError(f"{what} has {word[:20]}, which is no finite number.")
        return float(word)

    text = text.removeprefix(BYTE_ORDER_MARK)
    try:
        found = json.loads(
            text, object_pairs_hook=partial(once, what), parse_int=whole, parse_float=finite, parse_constant=finite
        )
        json.dumps(found, ensure_ascii=False).encode()  # fails on half a character, as \ud83d alone
    except SpecError:
        raise
    except ValueError as error:
        raise SpecError(f"{what} is no valid JSON: {error}.") from None
    except RecursionError:
        raise SpecError(f"{what} has lists or objects in one another too deep; a few levels are enough.") from None
    return found
