"""The texts of a request: what in them is no text, and what no pipeline of diffusers understands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import SpecError

_BOM = "\ufeff"  # that editors put at the start of a file; no encoder means anything by it
_SYNTAX = re.compile(  # of other programs, and nothing that people write otherwise
    r"""
      \((?=[^()]*[^\W\d])[^()\n]*[^()\d\s]\s*:\s*(?:\d(?:\.\d+)?|\.\d+)\s*\)  # (red:1.5)
    | \(\([^()\n]+\)\)                                                       # ((red))
    | \[[^\[\]"\n]+:\s*(?:\d+|\d*\.\d+)\s*\]                                  # [red:blue:0.5]
    | \[\[[^\[\]"\n]*[^\W\d][^\[\]"\n]*\]\]                                   # [[red]]
    | <(?:lora|lyco|hypernet):[^<>\n]+>
    | (?<!\w)embedding:[\w./-]+
    | (?<![\w"'])BREAK(?![\w"'])
    """,
    re.VERBOSE,
)
_SHOWN, _LONGEST = 4, 40  # pieces of syntax in a notice, and characters of one


def cleaned(name: str, value: Any) -> Any:
    """A text, or each in a list of them, without byte order marks; any other value as it is.

    Raises:
        SpecError: it holds half of a character.
    """
    if type(value) in (list, tuple):
        return type(value)(cleaned(name, item) if isinstance(item, str) else item for item in value)
    if not isinstance(value, str):
        return value
    text = value.replace(_BOM, "")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecError(
            f"{name} has {text[error.start]!a} as its character {error.start + 1}, which is half of a character "
            "(a lone surrogate); write that character anew."
        ) from None
    return text


def texts_of(arguments: Mapping[str, Any]) -> dict[str, list[str]]:
    """The prompts among a call's arguments, by their names; empty ones are left out."""
    found = {}
    for name, value in arguments.items():
        texts = [value] if isinstance(value, str) else value
        if "prompt" in name and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            found[name] = [text for text in texts if text.strip()]
    return found


def notices_of_syntax(texts: Mapping[str, list[str]]) -> Iterator[str]:
    """What a user must be told of syntax that reaches the encoders as it is written."""
    pieces = list(dict.fromkeys(piece for all in texts.values() for text in all for piece in _SYNTAX.findall(text)))
    if pieces:
        shown = [piece if len(piece) <= _LONGEST else piece[: _LONGEST - 1] + "…" for piece in pieces[:_SHOWN]]
        more = f" and {len(pieces) - _SHOWN} more" if len(pieces) > _SHOWN else ""
        yield (
            f"Read as plain words, since pipelines of diffusers know no syntax in a prompt: "
            f"{', '.join(map(repr, shown))}{more}."
        )
