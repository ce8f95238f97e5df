"""Which packages are there, as their metadata says it, and how the missing ones are installed. Nothing is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_FILE = Path(__file__).resolve().parents[1] / "requirements.txt"
_OTHER_NAMES = {"mslk-cuda": "mslk"}  # what PyTorch's own index calls it; on PyPI that is an empty 0.0.0
_INDISPENSABLE = ("accelerate", "diffusers", "transformers")  # what reads a pipeline; a backend is asked for by plans
_NAMED = 3  # in a sentence


def missing(requires: Iterable[str]) -> list[str]:
    """The pip requirements that are not met."""
    return [requirement for requirement in requires if not _is_met(Requirement(requirement))]


def _is_met(requirement: Requirement) -> bool:
    if requirement.marker and not requirement.marker.evaluate():
        return True  # it is for another system
    return any(requirement.specifier.contains(version, prereleases=True) for version in _versions(requirement))


def _versions(requirement: Requirement) -> list[str]:
    found = []
    for name in filter(None, (requirement.name, _OTHER_NAMES.get(requirement.name))):
        with suppress(metadata.PackageNotFoundError):
            found.append(metadata.version(name))
    return found


def why_not_installed() -> str:
    """What has to be installed before a pipeline can be read, with the command that installs all of the pack's
    requirements; nothing if it is there."""
    lines = _FILE.read_text(encoding="utf-8").splitlines()
    required = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    lacking = sorted(missing(required), key=_is_dispensable)
    if not lacking or _is_dispensable(lacking[0]):
        return ""
    named, rest = ", ".join(map(_described, lacking[:_NAMED])), len(lacking) - _NAMED
    named += f" and {rest} more" if rest > 0 else ""
    return f"The pack's requirements are not installed: {named}. Run this and restart: {_command()}"


def _is_dispensable(requirement: str) -> bool:
    return Requirement(requirement).name not in _INDISPENSABLE


def _described(requirement: str) -> str:
    versions = _versions(Requirement(requirement))
    return f"{requirement} ({versions[0]} is there)" if versions else requirement


def _command() -> str:
    """For the Python that runs, and without the user's own packages if it runs so, as the portable ComfyUI does."""
    alone = " -s" if sys.flags.no_user_site else ""
    return f'"{sys.executable}"{alone} -m pip install -r "{_FILE}"'
