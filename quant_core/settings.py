"""A way of doing something with its options, as data and as text: `blocks,mode=max-autotune,full_graph`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from .backend import Option, Value
from .errors import SpecError, choices, did_you_mean

OFF = "off"


@dataclass(frozen=True)
class Way:
    """One of several ways. A user interface turns its options into widgets."""

    name: str
    help: str
    options: tuple[Option, ...] = ()


@dataclass(frozen=True)
class Setting:
    """A way that was chosen, and all its options. Its text is what `parse_setting` reads."""

    way: str
    options: Mapping[str, Value] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __str__(self) -> str:
        said = (name if value is True else f"{name}={_text(value)}" for name, value in self.options.items())
        return ",".join((self.way, *said))


def make_setting(what: str, way: str, options: Mapping[str, Value], ways: Sequence[Way]) -> Setting | None:
    """The setting of `what`, with the defaults of the options that are not given; None for `off`.

    Raises:
        SpecError: there is no such way, or it does not take an option or its value.
    """
    if way == OFF:
        if options:
            raise SpecError(f"{what} is off, which takes no {next(iter(options))}; leave it out.")
        return None
    found = next((known for known in ways if known.name == way), None)
    if found is None:
        names = [known.name for known in ways]
        raise SpecError(f"{what} has no {way!r}{did_you_mean(way, names)}; use one of: {choices([OFF, *names])}.")
    known = {option.name: option for option in found.options}
    for name in options.keys() - known.keys():
        takes = f"it takes: {choices(known)}" if known else "it takes no options"
        raise SpecError(f"{what} {way} has no option {name!r}{did_you_mean(name, known)}; {takes}.")
    return Setting(way, {name: option.check(options.get(name, option.default)) for name, option in known.items()})


def parse_setting(what: str, text: str, ways: Sequence[Way]) -> tuple[str, dict[str, Value]]:
    """What a text says for `make_setting`: a way, then options as `name=value`, or `name` alone for one that is on.

    Raises:
        SpecError: the text is malformed.
    """
    way, *items = (item.strip() for item in text.split(","))
    found = next((known for known in ways if known.name == way), Way(way, ""))
    known = {option.name: option for option in found.options}
    options: dict[str, Value] = {}
    for item in items:
        name, is_there, value = (part.strip() for part in item.partition("="))
        if not name:
            raise SpecError(f"{what} is {text!r}, which has an empty option; leave out the comma.")
        if not is_there and name in known and not isinstance(known[name].default, bool):
            raise SpecError(f"{what} says no value of {name}; write {name}={_text(known[name].default) or '...'}.")
        if name in options:
            raise SpecError(f"{what} says {name} twice; keep one of them.")
        options[name] = _value(what, name, value, known.get(name)) if is_there else True
    return way, options


def _value(what: str, name: str, text: str, option: Option | None) -> Value:
    """A value of the option's type, or the text if there is no telling."""
    try:
        return option.parse(text) if option else text
    except ValueError as error:
        raise SpecError(f"{what} says {name}={text}; {error}.") from None


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
