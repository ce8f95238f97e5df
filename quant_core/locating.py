"""Where a model is: the bundled demo, a folder, or the hub."""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from pathlib import Path

from .availability import import_diffusers, quiet_libraries
from .errors import SourceError, one_sentence

logger = logging.getLogger(__name__)

DEMO = "demo"
BUNDLED = Path(__file__).resolve().parents[1] / "demo_model" / "pipeline"


def find_folder(
    source: str, *, allow_download: bool = False, revision: str | None = None, variant: str | None = None
) -> Path:
    """The folder of a source: `demo` for the bundled model, a folder (`./demo` for one of that name), or, only if
    allowed, a hub id.

    Raises:
        SourceError: there is no such folder, or the hub has no such pipeline in safetensors.
    """
    if source == DEMO:
        if revision is not None:
            raise SourceError(f"{source} is bundled and has no revision {revision!r}; leave it out.")
        if os.path.isfile(os.path.join(DEMO, "model_index.json")):
            _tell_of_another()
        return BUNDLED
    if not source.strip():
        raise SourceError(
            f"The model is named by an empty text; give the folder of a diffusers pipeline, {DEMO!r} or a hub id."
        )
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):
        if revision is not None:
            raise SourceError(f"{source} is a folder, which has no revision {revision!r}; leave it out.")
        return path.resolve()
    if not allow_download:
        raise SourceError(
            f"{source} is not a folder; give the folder of a diffusers pipeline, {DEMO!r}, "
            "or a hub id together with the permission to download it."
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SourceError(f"{source} is neither a folder nor a hub id, which reads owner/name.")
    diffusers = import_diffusers()
    try:
        with quiet_libraries():
            found = diffusers.DiffusionPipeline.download(
                source, revision=revision, variant=variant, use_safetensors=True
            )
    except (OSError, ValueError) as error:  # the hub's errors are among them
        raise SourceError(f"{source} could not be downloaded: {one_sentence(error)}.") from error
    return Path(found)


@cache
def _tell_of_another() -> None:
    """Once: a model is named more often than it is loaded."""
    logger.warning("%s is the bundled model; the pipeline in the folder of that name here is ./%s.", DEMO, DEMO)
