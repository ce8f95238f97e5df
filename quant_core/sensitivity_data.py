"""What quantizing each group of layers costs, as it was measured: plain data, read from and written to JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .comparison_report import decibels
from .errors import SourceError, SpecError
from .groups import BY
from .metrics import psnr_of
from .table import aligned
from .user_text import parse_json, read_text

_FORMAT = 1
_SHIPPED = Path(__file__).parent / "measured"
_ERRORS = ("errors", "latent_errors")


@dataclass(frozen=True)
class GroupSensitivity:
    """A group of linear layers, named by skip patterns; by spec, as `gguf/Q4_0`, what quantizing only this group does:
    the squared error of pictures in 0..1 that their mean PSNR says, and the relative error of the latents after the
    last step."""

    patterns: tuple[str, ...]
    layers: int
    parameters: int  # of the layers' weights
    errors: Mapping[str, float]
    latent_errors: Mapping[str, float]


@dataclass(frozen=True)
class ComponentSensitivity:
    """The groups of a component, by name."""

    class_name: str
    groups: Mapping[str, GroupSensitivity]


@dataclass(frozen=True)
class Sensitivity:
    """Where and how it was measured, and the components by name."""

    pipeline: str  # diffusers' class
    model: str
    pictures: int
    settings: Mapping[str, Any]  # of the request, as JSON has it
    versions: Mapping[str, str]
    components: Mapping[str, ComponentSensitivity]
    notices: tuple[str, ...] = ()  # what must be told of the runs, each once

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        return {"format": _FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Any) -> Sensitivity:
        """What `to_dict` wrote.

        Raises:
            SourceError: it is something else.
        """
        try:
            components = {
                name: ComponentSensitivity(
                    str(part["class_name"]), {key: _group(group) for key, group in part["groups"].items()}
                )
                for name, part in data["components"].items()
            }
            found = cls(
                str(data["pipeline"]),
                str(data["model"]),
                int(data["pictures"]),
                dict(data["settings"]),
                dict(data["versions"]),
                components,
                tuple(map(str, data.get("notices", ()))),
            )
            sound = data["format"] == _FORMAT and found.settings.get("by") in BY
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            sound = False
        if not sound:
            raise SourceError(
                f"This is no sensitivity data of format {_FORMAT}; give what the sensitivity command wrote."
            )
        return found


def _group(data: Mapping[str, Any]) -> GroupSensitivity:
    errors, latents = ({str(key): float(value) for key, value in data[name].items()} for name in _ERRORS)
    if not all(0 <= value < math.inf for value in (*errors.values(), *latents.values())):  # as NaN is not
        raise ValueError("an error is negative or none")
    return GroupSensitivity(
        tuple(map(str, data["patterns"])), int(data["layers"]), int(data["parameters"]), errors, latents
    )


def read_sensitivity(path: str | Path) -> Sensitivity:
    """The sensitivity data of a JSON file.

    Raises:
        SourceError: it cannot be read, or is something else.
    """
    try:
        return parse_sensitivity(read_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} cannot be read ({error}); give a file that the sensitivity command wrote."
        ) from None


def parse_sensitivity(text: str) -> Sensitivity:
    """The sensitivity data of a JSON text.

    Raises:
        SourceError: it is something else.
    """
    try:
        return Sensitivity.from_dict(parse_json("The sensitivity file", text))
    except SpecError as error:
        raise SourceError(str(error)) from None


@cache
def shipped() -> tuple[Sensitivity, ...]:
    """What comes with this package, a file per pipeline class."""
    return tuple(read_sensitivity(path) for path in sorted(_SHIPPED.glob("*.json")))


def format_sensitivity(found: Sensitivity) -> str:
    """PSNR in dB against 16 bit with only that group quantized, a line per group and a column per spec."""
    specs = list(dict.fromkeys(spec for group in _groups(found) for spec in group.errors))
    rows = [("component", "group", "layers", "weights", *specs)]
    for name, part in found.components.items():
        for key, group in part.groups.items():
            values = (decibels(psnr_of(group.errors[spec])) if spec in group.errors else "-" for spec in specs)
            rows.append((name, key, str(group.layers), f"{group.parameters / 1e6:.2f}M", *values))
    lines = aligned(rows, right=range(2, len(rows[0])))
    lines.append(
        f"Mean PSNR in dB to 16 bit with only that group quantized; {found.pictures} "
        f"picture{'s' * (found.pictures != 1)} of {found.model}."
    )
    return "\n".join([*lines, *found.notices])


def _groups(found: Sensitivity) -> list[GroupSensitivity]:
    return [group for part in found.components.values() for group in part.groups.values()]
