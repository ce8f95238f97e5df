"""How a managed model tells its placement of what happens to it."""

from __future__ import annotations

import weakref


class Convert:
    """In place of a managed module's `_apply`, through which PyTorch converts and moves its weights."""

    def __init__(self, module, placement):
        self.module = module
        self.placement = placement

    def __call__(self, change, recurse=True):
        module, placement = self.module(), self.placement()
        if placement is None:
            return type(module)._apply(module, change, recurse)
        placement.convert(change, module)
        return module


class BlockHook:
    """Tells a placement before and after a block runs. Does not hold the placement, whose modules hold it."""

    def __init__(self, placement, block, unit):
        self.placement = placement
        self.block = weakref.ref(block)
        self.unit = weakref.ref(unit)
        self.register()

    def register(self):
        """Be told of the block's runs."""
        block = self.block()
        self.handles = (
            block.register_forward_pre_hook(self.before),
            block.register_forward_hook(self.after, always_call=True),
        )

    def remove(self):
        """Be told no more."""
        for handle in self.handles:
            handle.remove()

    def before(self, module, inputs):
        """The block is about to run."""
        if (placement := self.placement()) is not None:
            placement._before(self.unit())

    def after(self, module, inputs, output):
        """It ran, or failed."""
        if (placement := self.placement()) is not None:
            placement._after(self.unit())
