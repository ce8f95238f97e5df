"""Where the weights of a component are: copies on the device that computes, as far as a budget allows."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from .ahead import Ahead
from .block_hooks import BlockHook, Convert
from .blocks import divide, spread
from .errors import QuantError, gib
from .lane import AHEAD, Lane
from .transfer import byte_size, copies, put, why_whole


@dataclass(eq=False)
class Unit:
    """Modules whose weights come and go together: a block of the model, or all that is in no block."""

    modules: list[nn.Module]
    size: int  # bytes of its weights and buffers
    device: torch.device  # where its weights are
    home: list[tuple] = field(default_factory=list)  # its weights where they stay, while copies stand in for them
    resident: bool = False  # the copies stay; else they go when the block has run
    pinned: bool = False  # its home is page-locked memory, from which a GPU copies while it computes


class Placement:
    """The weights of one component, which stay where they are, on the device `home`, and are copied to the device that
    computes.

    What is in no block of the model is on the device as a whole or not at all. Of the blocks, as many as the budget
    allows are resident; the others are streamed: each is copied before it runs, the next one meanwhile, and dropped
    afterwards. Dropping copies is all that leaving the device takes, so it cannot fail.

    `copy` makes the copy of a plain tensor on a device. `check` is called before each block and may raise to stop.
    `name` is what errors call it. Up to `pin_limit` bytes of what is streamed are locked into memory that a GPU can
    copy from while it computes.
    """

    def __init__(
        self,
        module: nn.Module,
        load_device: torch.device,
        home: torch.device,
        copy: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
        check: Callable[[], None] = lambda: None,
        name: str = "The model",
        pin_limit: int = 0,
    ):
        self.name = name
        self.load_device = load_device
        self.home = home
        self.why_whole = why_whole(module)
        self.evictions = 0  # how often weights left the device
        self.check = check
        self._lane = Lane(load_device, copy, pin_limit)
        blocks, rest = divide(module, byte_size) if not self.why_whole else ([], list(module.modules()))
        self._rest = _unit(rest, home)
        self._blocks = [_unit(list(block.modules()), home) for block in blocks]
        self._streamed_first = spread(self._blocks)
        self._follows = dict(zip(self._blocks, self._blocks[1:], strict=False))  # until it is seen how they run
        self._passing: list[Unit] = []  # streamed blocks on the device now
        self._last: Unit | None = None
        self._ahead: Ahead | None = None
        module._apply = Convert(weakref.ref(module), weakref.ref(self))
        self._hooks = [BlockHook(weakref.ref(self), *pair) for pair in zip(blocks, self._blocks, strict=True)]

    @contextmanager
    def as_one(self, why: str) -> Iterator[None]:
        """Nothing is streamed and nothing is checked between blocks, as long as this lasts: it is on the load device
        as a whole or not at all."""
        before, self.why_whole = self.why_whole, why
        for hook in self._hooks:
            hook.remove()
        try:
            yield
        finally:
            self.why_whole = before
            for hook in self._hooks:
                hook.register()

    @property
    def size(self) -> int:
        """Bytes of all weights and buffers as stored."""
        return self._rest.size + sum(unit.size for unit in self._blocks)

    @property
    def resident(self) -> int:
        """Bytes on the load device to stay; what is just being streamed is not counted."""
        return sum(unit.size for unit in self._units if unit.resident)

    @property
    def least(self) -> int:
        """Bytes on the load device when all blocks are streamed: the rest and the largest blocks that meet there."""
        return self._rest.size + sum(sorted((unit.size for unit in self._blocks), reverse=True)[:AHEAD])

    @property
    def streams(self) -> bool:
        """Whether blocks of it are streamed at its next use."""
        return self._rest.resident and not all(unit.resident for unit in self._blocks)

    @property
    def is_ahead(self) -> bool:
        """Whether its weights are being copied for a use to come."""
        return self._ahead is not None

    @property
    def _units(self) -> list[Unit]:
        return [self._rest, *self._blocks]

    def load(self, budget: float) -> int:
        """Make resident what fits into a budget of bytes, at least what is in no block. What is resident stays.

        Returns the bytes that were added. What raises on the way, as out of memory, leaves all as it was.

        Raises:
            QuantError: it does not fit, and its weights cannot be streamed.
        """
        if budget < self.size and self.why_whole and self.load_device != self.home:
            raise QuantError(
                f"{self.name} needs {gib(self.size)} on {self.load_device} and {gib(max(budget, 0))} are free; "
                f"{self.why_whole}."
            )
        self._forget_ahead()
        fits = budget >= self.size
        room = budget if fits else budget - sum(sorted((unit.size for unit in self._blocks), reverse=True)[:AHEAD])
        used, added = self.resident, []
        try:
            for unit in [self._rest, *reversed(self._streamed_first)]:
                if unit.resident or (unit is not self._rest and used + unit.size > room):
                    continue
                self._bring(unit)
                unit.resident = True
                if unit in self._passing:
                    self._passing.remove(unit)
                added.append(unit)
                used += unit.size
            self._lane.wait()
        except BaseException:
            for unit in added:
                self._drop(unit)
            raise
        return sum(unit.size for unit in added)

    def load_ahead(self) -> None:
        """Begin to copy, in the background, what is not on the load device, for `arrive`. Until then nothing of it
        counts as resident, and whatever else is asked of the placement drops it first."""
        self.settle()
        units = {unit: unit.modules for unit in self._units if unit.device != self.load_device}
        self._ahead = Ahead(units, self._lane.copy, self.load_device, self._lane.within())

    def arrive(self) -> int:
        """Wait for what `load_ahead` copies, and make it resident; returns the bytes that were added: none where there
        is nothing of the kind or not all of it could be copied."""
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return 0
        made = ahead.wait()
        for unit, places in made.items():
            unit.home, unit.device, unit.resident = put(places), self.load_device, True
        self._lane.wait()
        return sum(unit.size for unit in made)

    def unload(self, amount: float) -> int:
        """Stream blocks that were resident until `amount` bytes are free; returns how many are."""
        self._forget_ahead()
        freed = 0
        for unit in self._streamed_first:
            if freed >= amount:
                break
            if unit.resident:
                self._drop(unit)
                freed += unit.size
        self.evictions += freed > 0
        return freed

    def evict(self) -> None:
        """Leave the load device altogether."""
        self._forget_ahead()
        self.evictions += self._rest.resident
        for unit in self._units:
            self._drop(unit)
        self.settle()

    def settle(self) -> None:
        """Drop what a stopped run left on the device beyond what is resident."""
        self._forget_ahead()
        for unit in self._passing:
            self._drop(unit)
        self._passing = []
        self._last = None
        self._lane.forget()

    def convert(self, change: Callable[[torch.Tensor], torch.Tensor], module: nn.Module) -> None:
        """Change the weights where they stay, as `module.to(dtype=...)` asks: SDXL has its VAE in float32 for a
        decode. What was resident is so again. A change of device alone is not made: that is what this class is for."""
        half, full = torch.empty(0, dtype=torch.float16), torch.empty(0)
        keeps = change(half).dtype == half.dtype and change(full).dtype == full.dtype
        if keeps and change(half).device != half.device:
            return
        there = [unit for unit in self._units if unit.resident]
        self.evict()
        put(copies(module.modules(), lambda tensor: tensor, self.home))  # others are changed, see `at_home`
        with torch.inference_mode(False), torch.no_grad():
            type(module)._apply(module, lambda tensor: change(tensor).to(tensor.device))
        for unit in self._units:
            unit.size, unit.pinned = byte_size(unit.modules), False
        for unit in there:
            self._bring(unit)
            unit.resident = True
        self._lane.wait()

    @contextmanager
    def at_home(self) -> Iterator[None]:
        """The modules have the weights that stay, and copies stand aside, as long as this lasts. Where the weights
        are others afterwards, the copies go."""
        self.settle()
        before = [(unit, put(unit.home), _own(unit)) for unit in self._units]
        try:
            yield
        finally:
            for unit, copied, own in before:
                if _own(unit) == own:
                    unit.home = put(copied)
                    continue
                self.evictions += unit.resident
                unit.home, unit.device, unit.resident, unit.pinned = [], self.home, False, False
                unit.size = byte_size(unit.modules)

    def modules(self) -> Iterator[nn.Module]:
        """All modules of the component."""
        return (module for unit in self._units for module in unit.modules)

    def exchange(self, modules: dict[nn.Module, nn.Module]) -> None:
        """Modules of the component were replaced by others, whose weights are where the others' were at rest."""
        self.evict()
        gone = {part for module in modules for part in module.modules()}
        for unit in self._units:
            if any(part in modules for part in unit.modules):
                kept = [part for part in unit.modules if part not in gone]
                new = [part for old in unit.modules if old in modules for part in modules[old].modules()]
                unit.modules = kept + new
                unit.size, unit.pinned = byte_size(unit.modules), False

    def weights(self) -> Iterator[torch.Tensor]:
        """All weights and buffers as they are in RAM."""
        for unit in self._units:
            if unit.home:
                yield from (place.value for place in unit.home if isinstance(place.value, torch.Tensor))
            else:
                own = (
                    tensor
                    for part in unit.modules
                    for held in (part._parameters, part._buffers)
                    for tensor in held.values()
                )
                yield from (tensor for tensor in own if tensor is not None)

    def _forget_ahead(self) -> None:
        ahead, self._ahead = self._ahead, None
        if ahead:
            ahead.stop()

    def _bring(self, unit: Unit) -> None:
        if unit.device != self.load_device:
            unit.home = put(copies(unit.modules, self._lane.copy, self.load_device))
            unit.device = self.load_device

    def _drop(self, unit: Unit) -> None:
        if unit.home:
            put(unit.home)
            unit.home, unit.device = [], self.home
        unit.resident = False

    def _before(self, unit: Unit) -> None:
        self.check()
        self._forget_ahead()
        if self._last is not None:
            self._follows[self._last] = unit  # models do not all run their blocks in the order of registration
        if unit.resident or not self._rest.resident:
            return
        for other in self._passing:
            if other is not unit:
                self._drop(other)  # fetched in vain, or left by a run that was stopped
        self._passing = [other for other in self._passing if other is unit]
        self._fetch(unit)
        self._lane.wait()
        if following := self._next_streamed(unit):
            self._fetch(following)

    def _next_streamed(self, unit: Unit) -> Unit | None:
        following = self._follows.get(unit)
        for _ in self._blocks:  # that follow one another need not come back to this one
            if following is None or not following.resident:
                return following
            following = self._follows.get(following)
        return None

    def _fetch(self, unit: Unit) -> None:
        if unit in self._passing:
            return
        self._lane.catch_up()
        if not unit.pinned and unit.device != self.load_device:
            unit.pinned = self._lane.pin(unit.modules)
        self._bring(unit)
        self._passing.append(unit)

    def _after(self, unit: Unit) -> None:
        if unit in self._passing:
            self._passing.remove(unit)
            self._lane.used()
            self._drop(unit)
        self._last = unit


def _own(unit: Unit) -> list[int]:
    """Which tensors the modules of a unit have."""
    held = (own for module in unit.modules for own in (module._parameters, module._buffers))
    return [id(tensor) for own in held for tensor in own.values()]


def _unit(modules: list[nn.Module], device: torch.device) -> Unit:
    return Unit(modules, byte_size(modules), device)
