"""What a pipeline's own code raises, as one sentence of ours."""

from __future__ import annotations

import re
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
    return text if isinstance(error, (TypeError, ValueError)) or text == kind else f"{kind}: {text}"


def _missing_package(error: BaseException) -> str:
    """What to install, where the error says that something is not; diffusers uses names of optional packages also
    where their import was left out, which is a NameError."""
    from diffusers.utils.import_utils import BACKENDS_MAPPING

    module = (getattr(error, "name", None) or "").split(".")[0]
    is_absent = bool(module) and module.isidentifier() and find_spec(module) is None
    if isinstance(error, NameError):
        is_absent = is_absent and module in BACKENDS_MAPPING
    elif not isinstance(error, ImportError):
        return ""
    said = str(error) + (BACKENDS_MAPPING[module][1] if module in BACKENDS_MAPPING else "")
    if line := re.search(r"pip install ([\w.-]*\w)", said):
        return line[1]
    return module if is_absent else ""
