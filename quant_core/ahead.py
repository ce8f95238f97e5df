"""Copies of weights that are made in the background, for a use to come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn

from .transfer import Copy, Place, copies

Modules = Mapping[Hashable, list[nn.Module]]


class Ahead:
    """Copies of several units of modules, made by a thread of their own. The modules are only read: nothing of them
    changes.

    A copy from ordinary memory to a GPU holds up the thread that asks for it until it is done, without holding up
    Python's others. `within` is a context that the thread enters, as of the stream for which it copies.
    """

    def __init__(
        self,
        units: Modules,
        copy: Copy,
        device: torch.device,
        within: Callable[[], AbstractContextManager],
    ):
        self._made: dict[Hashable, list[Place]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(units, copy, device, within), name="copies ahead")
        self._thread.start()

    def _run(self, units: Modules, copy: Copy, device: torch.device, within: Callable) -> None:
        made = {}
        try:
            with within():
                for unit, modules in units.items():
                    if self._stop.is_set():
                        return
                    made[unit] = copies(modules, copy, device)
        except Exception:  # out of memory, most of all: who then needs the weights copies them, and sees it raised
            return
        self._made = made

    def wait(self) -> dict[Hashable, list[Place]]:
        """The copies, by unit, once all are made; none if one could not be."""
        self._thread.join()
        made, self._made = self._made, {}
        return made

    def stop(self) -> None:
        """Make no more of them, and drop those that were made."""
        self._stop.set()
        self.wait()
