"""Where the weights of a component are: copies on the device that computes, as far as a budget allows."""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from .errors import QuantError, gib
from .transfer import byte_size, copies, put, why_whole

_SMALLEST = 1000  # a block of less than this part of the whole stays with what is always there
_LARGEST = 8  # a block of more than this part of the whole is divided further, where it has blocks of its own
_NEVER_RUN = (nn.ModuleList, nn.ModuleDict)  # only what they hold is
_AHEAD = 3  # streamed blocks on the device at once: the one that ended, the one that runs, the next


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
    """The weights of one component, which stay in RAM and are copied to the device that computes.

    What is in no block of the model is on the device as a whole or not at all. Of the blocks, as many as the budget
    allows are resident; the others are streamed: each is copied before it runs, the next one meanwhile, and dropped
    afterwards. Dropping copies is all that leaving the device takes, so it cannot fail.

    `copy` makes the copy of a plain tensor on a device. `check` is called before each block and may raise to stop.
    """

    def __init__(
        self,
        module: nn.Module,
        load_device: torch.device,
        offload_device: torch.device,
        copy: Callable[[torch.Tensor, torch.device], torch.Tensor] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        self.load_device = load_device
        self.offload_device = offload_device
        self.why_whole = why_whole(module)
        self.evictions = 0  # how often weights left the device
        self.check = check
        self._lane = _Lane(load_device, copy)
        blocks, rest = _divide(module) if not self.why_whole else ([], list(module.modules()))
        self._rest = _unit(rest, offload_device)
        self._blocks = [_unit(list(block.modules()), offload_device) for block in blocks]
        self._streamed_first = _spread(self._blocks)
        self._follows = dict(zip(self._blocks, self._blocks[1:] + self._blocks[:1], strict=True))
        self._passing: list[Unit] = []  # streamed blocks on the device now
        self._last: Unit | None = None
        for block, unit in zip(blocks, self._blocks, strict=True):
            hook = _BlockHook(weakref.ref(self), unit)
            block.register_forward_pre_hook(hook.before)
            block.register_forward_hook(hook.after, always_call=True)

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
        return self._rest.size + sum(sorted((unit.size for unit in self._blocks), reverse=True)[:_AHEAD])

    @property
    def streams(self) -> bool:
        """Whether blocks of it are streamed at its next use."""
        return self._rest.resident and not all(unit.resident for unit in self._blocks)

    @property
    def _units(self) -> list[Unit]:
        return [self._rest, *self._blocks]

    def load(self, budget: float) -> int:
        """Make resident what fits into a budget of bytes, at least what is in no block. What is resident stays.

        Returns the bytes that were added. What raises on the way, as out of memory, leaves all as it was.

        Raises:
            QuantError: it does not fit, and its weights cannot be streamed.
        """
        if budget < self.size and self.why_whole and self.load_device != self.offload_device:
            raise QuantError(
                f"It needs {gib(self.size)} on {self.load_device} and {gib(max(budget, 0))} are free; "
                f"{self.why_whole}."
            )
        fits = budget >= self.size
        room = budget if fits else budget - sum(sorted((unit.size for unit in self._blocks), reverse=True)[:_AHEAD])
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

    def unload(self, amount: float) -> int:
        """Stream blocks that were resident until `amount` bytes are free; returns how many are."""
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
        self.evictions += self._rest.resident
        for unit in self._units:
            self._drop(unit)
        self.settle()

    def settle(self) -> None:
        """Drop what a stopped run left on the device beyond what is resident."""
        for unit in self._passing:
            self._drop(unit)
        self._passing = []
        self._last = None
        self._lane.forget()

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

    def _bring(self, unit: Unit) -> None:
        if unit.device != self.load_device:
            unit.home = put(copies(unit.modules, self._lane.copy, self.load_device))
            unit.device = self.load_device

    def _drop(self, unit: Unit) -> None:
        if unit.home:
            put(unit.home)
            unit.home, unit.device = [], self.offload_device
        unit.resident = False

    def _before(self, unit: Unit) -> None:
        self.check()
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
        self._fetch(self._next_streamed(unit))

    def _next_streamed(self, unit: Unit) -> Unit:
        following = self._follows[unit]
        for _ in self._blocks:  # that follow one another need not come back to this one
            if not following.resident:
                return following
            following = self._follows[following]
        return unit

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


class _BlockHook:
    """Does not hold the placement, whose modules hold it."""

    def __init__(self, placement, unit):
        self.placement = placement
        self.unit = weakref.ref(unit)

    def before(self, module, inputs):
        if (placement := self.placement()) is not None:
            placement._before(self.unit())

    def after(self, module, inputs, output):
        if (placement := self.placement()) is not None:
            placement._after(self.unit())


class _Lane:
    """Copies to a device; to a GPU while it computes."""

    def __init__(self, device, copy):
        self.device = device
        self._given = copy
        self._side = torch.cuda.Stream(device) if device.type == "cuda" and copy is None else None
        self._events = deque()

    def copy(self, tensor):
        if self._given:
            return self._given(tensor, self.device)
        if self._side is None:
            return tensor.to(self.device)
        computing = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._side):
            made = tensor.to(self.device, non_blocking=True)
        made.record_stream(computing)
        return made

    def wait(self):
        """What computes from now on sees what was copied until now."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    def used(self):
        """A streamed block was handed to the GPU."""
        if self._side is not None:
            self._events.append(torch.cuda.current_stream(self.device).record_event())

    def catch_up(self):
        """Do not run ahead of the GPU: the memory of a block comes back when the GPU is done with it."""
        while len(self._events) > _AHEAD - 2:
            self._events.popleft().synchronize()

    def forget(self):
        self._events.clear()

    def pin(self, modules):
        if self._side is None:
            return False
        try:
            put(copies(modules, lambda tensor: tensor.pin_memory(), torch.device("cpu")))
        except RuntimeError:  # no more memory may be locked: copied from as it is, only slower
            return False
        return True


def _unit(modules: list[nn.Module], device: torch.device) -> Unit:
    return Unit(modules, byte_size(modules), device)


def _divide(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The blocks of a model in order of registration, and all modules that are in none of them."""
    total = byte_size(module.modules())
    blocks = [block for block in _blocks(module, total / _LARGEST) if byte_size(block.modules()) * _SMALLEST >= total]
    users = _uses(module)
    blocks = [block for block in blocks if all(users[key] == count for key, count in _uses(block).items())]
    inside = {id(part) for block in blocks for part in block.modules()}
    return blocks, [part for part in module.modules() if id(part) not in inside]


def _blocks(module: nn.Module, most: float) -> list[nn.Module]:
    found = []
    for child in module.children():
        listed = isinstance(module, nn.ModuleList) and not isinstance(child, _NEVER_RUN)
        inner = [] if listed and byte_size(child.modules()) <= most else _blocks(child, most)
        found += inner or [child] * listed
    return list(dict.fromkeys(found))


def _uses(module: nn.Module) -> Counter:
    """How often each tensor is used, a module that stands in two places counted twice: weights that are used outside
    of a block too cannot come and go with it."""
    parts = (part for _, part in module.named_modules(remove_duplicate=False))
    held = (tensor for part in parts for tensors in (part._parameters, part._buffers) for tensor in tensors.values())
    return Counter(id(tensor) for tensor in held if tensor is not None)


def _spread(blocks: list[Unit]) -> list[Unit]:
    """The blocks in an order of which each beginning is spread evenly (van der Corput's sequence), so that a few
    streamed blocks are copied while the many between them compute."""
    width = max(len(blocks) - 1, 1).bit_length()
    order = [int(format(number, f"0{width}b")[::-1], 2) for number in range(2**width)]
    return [blocks[index] for index in order if index < len(blocks)]
