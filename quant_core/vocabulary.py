"""Whether a tokenizer has the vocabulary that its text encoder was made for: the libraries load one that has none."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from .availability import ensure_packages
from .errors import QuantError, SourceError, is_out_of_memory, one_sentence
from .source import ComponentInfo, PipelineIndex

_WHOLE = "tokenizer.json"
_OTHER_NAMES = re.compile(r"tekken\.json|tokenizer\.model.*|tiktoken\.model")  # that transformers looks for as well
_READS_MODEL = ("sentencepiece", "protobuf")  # what transformers reads a sentencepiece model with
_LEAST = 3  # tokens beside the added ones; some classes bring one or two of their own
_FEW = 0.05  # of the tokens may have no embedding: rare ones that no prompt has, in models that work


def ensure_files(info: ComponentInfo) -> None:
    """Check that a tokenizer's folder holds its vocabulary, and that this machine can read it.

    Raises:
        SourceError: files are missing, as after a download that was cut short.
        BackendUnavailable: packages are missing; the message is the install line.
    """
    from transformers import PreTrainedTokenizerBase, TokenizersBackend

    if not issubclass(info.cls, PreTrainedTokenizerBase):
        return
    found = {path.name for path in info.folder.iterdir()}
    if _WHOLE in found and issubclass(info.cls, TokenizersBackend):
        return
    named = info.cls.vocab_files_names
    needed = [named[key] for key in ("vocab_file", "merges_file") if key in named]
    files = needed if needed and found.issuperset(needed) else [name for name in found if _OTHER_NAMES.fullmatch(name)]
    if not files and (needed or _WHOLE in named.values()):
        ways = [_WHOLE] if issubclass(info.cls, TokenizersBackend) else []
        ways += [" and ".join(needed)] if needed else []
        raise SourceError(
            f"{info.name} has no vocabulary: its folder does not hold {', nor '.join(ways)}; download the model again."
        )
    if issubclass(info.cls, TokenizersBackend) and any(name.endswith(".model") for name in files):
        ensure_packages(f"{info.name}, which is a {' and '.join(files)},", _READS_MODEL)


def ensure_words(info: ComponentInfo, tokenizer: Any) -> None:
    """Check that a loaded tokenizer knows more than special tokens.

    Raises:
        SourceError: it does not.
    """
    if len(tokenizer) - len(tokenizer.added_tokens_decoder) < _LEAST:
        raise SourceError(
            f"{info.name} has no vocabulary: it knows {len(tokenizer)} tokens, all of them special; "
            "download the model again."
        )


def ensure_embedded(index: PipelineIndex, tokenizers: Mapping[str, Any]) -> None:
    """Check that text encoders have embeddings for what their tokenizers say: the tokens of each prompt, and nearly
    all words.

    Raises:
        SourceError: one has not, as when they are of different models; or a tokenizer does not work at all.
    """
    for name, tokenizer in tokenizers.items():
        encoder = name.replace("tokenizer", "text_encoder")
        rows = _rows(index.models[encoder]) if encoder != name and encoder in index.models else None
        if rows is None:
            continue
        try:
            always = tokenizer("").input_ids
        except Exception as error:  # whatever a tokenizer makes of its own settings
            if is_out_of_memory(error):
                raise
            raise SourceError(f"{name} cannot read an empty prompt: {one_sentence(error)}.") from error
        plain = _plain(tokenizer) if len(tokenizer) > rows else []
        beyond = sum(number >= rows for number in plain)
        if beyond > _FEW * len(plain) or max(always, default=0) >= rows:
            raise SourceError(
                f"{name} does not belong to {encoder}: it has tokens up to number {max([*plain, *always])}, and "
                f"{encoder} has {rows} embeddings; download the model again."
            )


def _plain(tokenizer: Any) -> list[int]:
    """The numbers of all tokens but the added ones, of which some models have more than embeddings."""
    added = tokenizer.added_tokens_decoder
    return [number for number in tokenizer.get_vocab().values() if number not in added]


def _rows(encoder: ComponentInfo) -> int | None:
    """The size of the embedding of tokens that a text encoder's config tells of."""
    kind = getattr(encoder.cls, "config_class", None)
    if kind is None:
        return None
    try:
        config = kind.from_dict(copy.deepcopy(encoder.config)).get_text_config()
    except QuantError:
        raise
    except Exception as error:  # what is wrong with it is told by who makes a model of it
        if is_out_of_memory(error):
            raise
        return None
    rows = getattr(config, "vocab_size", None)
    return rows if type(rows) is int else None
