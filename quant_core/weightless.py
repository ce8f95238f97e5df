"""Schedulers, tokenizers, processors and guiders: components without weights, which are small and opened first."""

from __future__ import annotations

from typing import Any

import torch

from .availability import quiet_libraries
from .errors import BackendUnavailable, QuantError, SourceError, is_out_of_memory, one_sentence
from .json_file import POINTER, is_pointer, read_json
from .source import ComponentInfo, PipelineIndex
from .vocabulary import ensure_embedded, ensure_files, ensure_words

_VOCABULARIES = (".txt", ".model", ".tiktoken", ".jinja")  # which the libraries read as they are, whatever is in there
_TOKENS = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")  # of any tokenizer


def open_weightless(index: PipelineIndex) -> dict[str, Any]:
    """The components of a pipeline that have no weights, opened from their files alone.

    Raises:
        SourceError: files are missing, damaged, not what they should be, or a tokenizer's are of another model.
        BackendUnavailable: one needs a package that is missing.
    """
    with torch.inference_mode(False), quiet_libraries():
        found = {name: _opened(info) for name, info in index.components.items() if not info.has_weights}
        tokenizers = {name: _tokenizer(component) for name, component in found.items()}
        ensure_embedded(index, {name: tokenizer for name, tokenizer in tokenizers.items() if tokenizer is not None})
    return found


def _opened(info: ComponentInfo) -> Any:
    files = [path for path in info.folder.glob("[!.]*") if path.is_file()]  # no file of an archive's or a system's own
    if not files:
        raise SourceError(f"{info.name} is named in model_index.json, but the pipeline has no files of it.")
    for path in files:
        if path.name.endswith("config.json") or path.name in (*_TOKENS, *_vocabulary(info.cls)):
            read_json(path, info.name)  # what is no object, diffusers takes for the name of a model on the hub
        elif path.suffix in _VOCABULARIES and is_pointer(path):
            raise SourceError(f"{info.name}: its {path.name} {POINTER}.")
    ensure_files(info)
    arguments: dict[str, Any] = {"local_files_only": True}
    if info.library == "transformers":
        arguments["trust_remote_code"] = False  # unset, a processor asks on the terminal
    try:
        found = info.cls.from_pretrained(str(info.folder), **arguments)
        if (tokenizer := _tokenizer(found)) is not None:
            ensure_words(info, tokenizer)
        return found
    except QuantError:
        raise
    except Exception as error:  # whatever the libraries make of a config
        if is_out_of_memory(error):
            raise
        kind = BackendUnavailable if isinstance(error, ImportError) else SourceError
        why = one_sentence(error).partition(". ")[0]
        raise kind(f"{info.name} does not load as a {info.cls.__name__}: {why}.") from error


def _vocabulary(cls: type) -> list[str]:
    """The JSON files of words that a tokenizer's class reads."""
    return [name for name in getattr(cls, "vocab_files_names", {}).values() if name.endswith(".json")]


def _tokenizer(component: Any) -> Any:
    """The tokenizer that a component is or, being a processor, has."""
    from transformers import PreTrainedTokenizerBase

    found = getattr(component, "tokenizer", component)
    return found if isinstance(found, PreTrainedTokenizerBase) else None
