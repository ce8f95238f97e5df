"""A device of a size of our choice: the CPU under another name, so that all that is copied to it really computes."""

import threading
import weakref

import torch

from quant_core import Placement

CPU = torch.device("cpu")
DEVICE = torch.device("cpu", 0)


class Card:
    """Counts what is copied to the device and is alive there, in bytes.

    A component that is `manage`d has room for what it takes at least and `part` of what there is up to its size;
    with 0 for less than that.
    """

    def __init__(self, part=1.0):
        self.part = part
        self.used = self.peak = self.copied = 0
        self.lock = threading.RLock()
        self.failing = []  # number of a copy, the error it raises

    def copy(self, tensor, device):
        assert device == DEVICE
        self.copied += 1
        if self.failing and self.copied == self.failing[0]:
            raise self.failing.pop()  # not kept: it would hold the call that it came from
        made, size = tensor.clone(), tensor.numel() * tensor.element_size()
        with self.lock:  # a thread may copy ahead
            self.used += size
            self.peak = max(self.peak, self.used)
        weakref.finalize(made.untyped_storage(), self._gone, size)
        return made

    def _gone(self, size):
        with self.lock:
            self.used -= size

    def fail(self, count, error):
        """Raise an error at the copy of that number from now on, counted from one."""
        self.failing = [self.copied + count, error]


def place(module, card, check=lambda: None):
    """A placement in which a layer that runs where its weights are not is a failure."""
    placement = Placement(module, DEVICE, CPU, card.copy, check)
    for unit in placement._units:
        unit_ref = weakref.ref(unit)
        for part in unit.modules:
            if part is not module and (part._parameters or part._buffers):
                part.register_forward_pre_hook(lambda part, inputs, unit=unit_ref: there(part, unit()))
    return placement


def there(part, unit):
    assert unit.device == DEVICE, f"{type(part).__name__} runs before its weights are on the device"


def manage(pipeline, card, check=lambda: None, cards=None):
    """Let components come into use on the device; `cards` may give some a device of their own.

    Returns the names of the components in the order in which they were asked for.
    """
    placements, used = pipeline.placements, []
    for name, module in pipeline.models.items():
        placements[name] = place(module, (cards or {}).get(name, card), check)

    def prepare(name):
        used.append(name)
        placements[name].load(budget(placements[name], card.part))

    pipeline.on_use(DEVICE, prepare)
    return used


def budget(placement, part):
    """Bytes between the least that a placement takes and its whole size; 0 for a part of 0."""
    return placement.size if part == 1 else part and placement.least + part * (placement.size - placement.least)


def resident(pipeline):
    """Bytes that are on the device to stay."""
    return sum(placement.resident for placement in pipeline.placements.values())
