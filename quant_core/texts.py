"""The texts of a request: what in them is no text, and what no pipeline of diffusers understands."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import SpecError, shortened

_BOM = "\ufeff"  # that editors put at the start of a file; no encoder means anything by it
_SYNTAX = re.compile(  # of other programs, as far as it can be told from what people write otherwise
    r"""
      \((?=[^()\n]*[^\W\d])[^()\n]*[^()\d\s]:[0-2]?\.\d+\)    # (red:1.5), but not (width:3)
    | \(\((?=[\d\s,]*[^\W\d])[\w\s,'-]+\)\)                    # ((red)), but not ((a + b) / 2)
    | \[(?=[^\[\]"\n]*[^\W\d])[^\[\]"\n]+:0?\.\d+\]           # [red:blue:0.5], but not [scene:2]
    | \[\[(?=[\d\s,]*[^\W\d])[\w\s,'-]+\]\]                    # [[red]], but not [[1, 2]]
    | <(?:lora|lyco|hypernet):[^<>\n]+>
    | (?<!\w)embedding:[\w./-]+
    | (?<![A-Z][\s,])(?<=[\s,])BREAK(?=[\s,])(?!\s+[A-Z]{2})(?!\W*\Z)  # between texts, but not BREAK DANCE
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
    """The prompts among a call's arguments, by their names, each once; empty ones are left out."""
    found, seen = {}, set()
    for name, value in arguments.items():
        texts = [value] if isinstance(value, str) else value
        if "prompt" in name and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            found[name] = [text for text in dict.fromkeys(texts) if text.strip() and text not in seen]
            seen.update(texts)
    return found


def notices_of_syntax(texts: Mapping[str, list[str]]) -> Iterator[str]:
    """What a user must be told of syntax that reaches the encoders as it is written."""
    pieces = list(dict.fromkeys(piece for all in texts.values() for text in all for piece in _SYNTAX.findall(text)))
    if pieces:
        shown = ", ".join(repr(shortened(piece, _LONGEST)) for piece in pieces[:_SHOWN])
        more = f" and {len(pieces) - _SHOWN} more" if len(pieces) > _SHOWN else ""
        yield (f"Read as it is written, since pipelines of diffusers know no syntax in a prompt: {shown}{more}.")
