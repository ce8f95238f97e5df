"""What of a prompt an encoder does not read: seen at the tokenizers while the pipeline calls them, since what is cut
off, and where, is up to each pipeline."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .errors import dispensable, shortened
from .texts import texts_of

_MOST = "max_sequence_length"
_ALIKE = 30  # letters at its start that tell a text that was cleaned
_LONGEST = 50  # characters of an unread end in a notice


@dataclass(frozen=True)
class Reading:
    """How a tokenizer took a text of a request: tokens that were read, of how many, and the text of the others."""

    read: int
    total: int
    rest: str = ""
    remedy: str = ""  # what would let it read more


@dataclass
class Readings:
    """What each tokenizer, by its name in the pipeline, made of each of the `texts`, which are (argument, text)."""

    texts: list[tuple[str, str]]
    most: int | None  # its limit that is in force, if the pipeline has one
    of: dict[tuple[str, str], dict[str, Reading]] = field(default_factory=dict)

    def note(self, name: str, tokenizer: Any, tokenize: Any, given: str, kept: int, settings: dict[str, Any]) -> None:
        """The tokenizer of that name has kept so many tokens of a text, in which one of the request's may be.

        `tokenize` is its own call, and `settings` are what the pipeline called it with.
        """
        source = self._source(given)
        if source is None:
            return
        special = settings.get("add_special_tokens", True)
        whole = tokenize(tokenizer, given, add_special_tokens=special, verbose=False)["input_ids"]
        readings = self.of.setdefault(source, {})
        if len(whole) > kept:
            rest = _unread(tokenizer, whole, kept)
            if _letters(rest) not in _letters(_after(given, source[1])):
                remedy = self._remedy(tokenizer, len(whole) - kept, settings.get("max_length"))
                readings[name] = Reading(kept, len(whole), rest, remedy)
        elif name not in readings:
            readings[name] = self._sliced(tokenizer, tokenize, source[1]) or Reading(kept, len(whole))

    def _sliced(self, tokenizer: Any, tokenize: Any, text: str) -> Reading | None:
        """Of a text that the tokenizer leaves whole, and the pipeline cuts afterwards."""
        own = tokenize(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"]
        if self.most is None or len(own) <= self.most:
            return None
        rest = tokenizer.decode(own[self.most :], skip_special_tokens=True).strip()
        return Reading(self.most, len(own), rest, self._remedy(tokenizer, len(own) - self.most, self.most))

    def _remedy(self, tokenizer: Any, lost: int, limit: int | None) -> str:
        longest = tokenizer.model_max_length
        if self.most is None or limit is None or (limit == longest and limit != self.most):
            return ""  # as of CLIP, whose limit is its own
        wanted = min(self.most + lost, longest)
        much = "all of it" if wanted == self.most + lost else "more"
        return f"a {_MOST} of {wanted} reads {much}" if wanted > self.most else ""

    def _source(self, given: str) -> tuple[str, str] | None:
        """Whose text it is: templates stand around it, and pipelines clean it, as by putting it into small letters."""
        held = [source for source in self.texts if _letters(source[1]) in _letters(given)]
        held = held or [source for source in self.texts if _letters(source[1])[:_ALIKE] in _letters(given)]
        return max(held, key=lambda source: len(source[1]), default=None)

    def notices(self, pipe: Any) -> Iterator[str]:
        """What a user must be told: of each text that is cut, by which components and where."""
        for (argument, _), readings in self.of.items():
            cut: dict[Reading, list[str]] = {}
            for name, reading in readings.items():
                if reading.rest:
                    cut.setdefault(reading, []).append(name)
            whole = [_component(pipe, name) for name, reading in readings.items() if not reading.rest]
            for reading, names in cut.items():
                yield _sentence(argument, reading, [_component(pipe, name) for name in names], whole)


@contextmanager
def watching(pipe: Any, arguments: Mapping[str, Any]) -> Iterator[Readings]:
    """As long as this lasts, note what the pipeline's tokenizers cut off of the prompts among its arguments."""
    sources = [(argument, text) for argument, texts in texts_of(arguments).items() for text in texts]
    own = inspect.signature(type(pipe).__call__).parameters.get(_MOST)
    most = arguments.get(_MOST, own.default if own else None)
    readings = Readings(sources, most if type(most) is int else None)
    tokenizers = _tokenizers(pipe) if sources else {}
    kinds = {name: type(tokenizer) for name, tokenizer in tokenizers.items()}
    try:
        for name, tokenizer in tokenizers.items():
            tokenizer.__class__ = _watched(name, kinds[name], readings)  # a call is looked up in the class alone
        yield readings
    finally:
        for name, tokenizer in tokenizers.items():
            tokenizer.__class__ = kinds[name]


def _tokenizers(pipe: Any) -> dict[str, Any]:
    """Name in the pipeline -> tokenizer, also of a processor; each once."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    found: dict[int, tuple[str, Any]] = {}
    for name, part in vars(pipe).items():
        tokenizer = getattr(part, "tokenizer", None) if isinstance(part, ProcessorMixin) else part
        if isinstance(tokenizer, PreTrainedTokenizerBase):
            found.setdefault(id(tokenizer), (name, tokenizer))
    return dict(found.values())


def _watched(name: str, kind: type, readings: Readings) -> type:
    @functools.wraps(kind.__call__)
    def call(self: Any, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, text, *args, **kwargs)
        with dispensable("notice of what is not read"):
            batch = [text] if isinstance(text, str) else text
            rows = result["input_ids"]
            rows = rows if hasattr(rows[0], "__len__") else [rows]
            for given, row in zip(batch, rows, strict=True):
                readings.note(name, self, kind.__call__, given, len(row), kwargs)
        return result

    return type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})


def _unread(tokenizer: Any, whole: list[int], kept: int) -> str:
    """The text of the tokens that were cut off, which are not those that every text ends with."""
    special = set(tokenizer.all_special_ids)
    end = next((at for at in range(len(whole), 0, -1) if whole[at - 1] not in special), 0)
    lost = len(whole) - kept
    is_left = getattr(tokenizer, "truncation_side", "right") == "left"
    tokens = whole[:lost] if is_left else whole[end - lost : end]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


def _after(given: str, text: str) -> str:
    """What a template puts behind a text, as far as it can be told."""
    at = given.casefold().rfind(text.casefold())
    return given[at + len(text) :] if at >= 0 else ""


def _letters(text: str) -> str:
    return re.sub(r"\W+", "", text.casefold())


def _component(pipe: Any, name: str) -> str:
    """The text encoder that a tokenizer is for, with its class."""
    encoder = name.replace("tokenizer", "text_encoder")
    model = vars(pipe).get(encoder)
    return f"{encoder} ({type(model).__name__})" if model is not None and encoder != name else name


def _sentence(argument: str, reading: Reading, cut: list[str], whole: list[str]) -> str:
    text = (
        f"{' and '.join(cut)} read{'s' * (len(cut) == 1)} {reading.read} of {reading.total} tokens of the {argument}, "
        f"without {shortened(reading.rest, _LONGEST)!r}"
    )
    if whole:
        text += f"; {' and '.join(whole)} read{'s' * (len(whole) == 1)} all of it"
    return "; ".join(filter(None, (text, reading.remedy))) + "."
