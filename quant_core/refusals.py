"""What a pipeline's own code raises, as one sentence of ours."""

from __future__ import annotations

import linecache
import re
import traceback
from importlib.util import find_spec

from .errors import BackendUnavailable, QuantError, SpecError, is_out_of_memory, one_sentence

_LONGEST = 200  # characters of a cause


def is_foreign(error: BaseException) -> bool:
    """Whether an error is a library's, and no host's interrupt, none of ours, and not out-of-memory: those go out as
    they are."""
    return isinstance(error, Exception) and not isinstance(error, QuantError) and not is_out_of_memory(error)


def explained(error: BaseException, name: str, steps: int) -> QuantError:
    """What to raise from a library's error that the pipeline of that name met after so many denoising steps."""
    if package := _missing_package(error):
        return BackendUnavailable(f"{name} needs a package that is not installed; run: pip install {package}.")
    if steps:
        return QuantError(f"{name} failed after {steps} step{'s' * (steps > 1)}: {_cause(error)}.")
    return SpecError(f"{name} refuses the request: {_cause(error)}.")


def _cause(error: BaseException) -> str:
    """The error's first line; with its kind, unless that is how Python says that an argument is wrong."""
    text = one_sentence(error)[:_LONGEST]
    kind = type(error).__name__
    return text if isinstance(error, (TypeError, ValueError)) or text.startswith(kind) else f"{kind}: {text}"


def _missing_package(error: BaseException) -> str:
    """What to install, where the error says that something is not."""
    from diffusers.utils.import_utils import BACKENDS_MAPPING

    if not isinstance(error, (ImportError, NameError)):
        return ""
    module = _not_imported(error) if isinstance(error, NameError) else error.name
    module = (module or "").split(".")[0]
    said = str(error) * isinstance(error, ImportError) + (
        BACKENDS_MAPPING[module][1] if module in BACKENDS_MAPPING else ""
    )
    if line := re.search(r"pip install ([\w.-]*\w)", said):
        return line[1]
    return module if module and find_spec(module) is None else ""


def _not_imported(error: NameError) -> str:
    """The module that a name stands for, which the code that uses it imports on a condition only; as many pipelines do
    with optional packages."""
    if error.__traceback__ is None or not error.name:
        return ""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = re.escape(error.name)
    imported = re.compile(
        rf"[ \t]+(?:from ([\w.]+) import (?:.*\W)?{name}\b|import ([\w.]+) as {name}\b|import ({name})\b)"
    )
    lines = map(imported.match, linecache.getlines(frame.f_code.co_filename))
    return next((next(filter(None, line.groups())) for line in lines if line), "")
