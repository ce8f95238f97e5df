"""A component quantized layer by layer: by way of the store, which has it from then on, or in memory."""

from __future__ import annotations

import logging
import time
import weakref
from contextlib import suppress
from dataclasses import dataclass

from torch import nn

from .allocator import give_back
from .container import ensure_checksums
from .entries import Job, Tell, entry_bytes, entry_key, read_entry, write_entry
from .errors import DamagedEntry, StoreError, is_out_of_memory, one_sentence
from .layers import quantized_layers
from .manifest import Key
from .reading import cast, read_mapped
from .store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """Where a component came from: its `checkpoint`, a `file` that the plan names, the `store`, or was it `quantized`
    now, and if so `stored`; how long that took, and why it is not stored."""

    kind: str
    seconds: float
    note: str = ""


def describe_origin(name: str, spec: object, origin: Origin) -> str:
    """As `transformer: torchao/int8wo from the store, 0.4 s`."""
    kinds = {"store": "from the store", "stored": "quantized and stored", "file": "from its file"}
    kind = kinds.get(origin.kind, f"quantized, not stored{': ' * bool(origin.note)}{origin.note}")
    return f"{name}: {spec} {kind}, {origin.seconds:.1f} s"


def load_quantized(job: Job, store: Store | None, tell: Tell) -> tuple[nn.Module, Origin]:
    """The component of a job, read from the store or quantized and, where that can be, stored.

    `tell` gets the share that is done, as a part of a whole; it may raise to stop, which leaves nothing behind.

    Raises:
        SourceError: its checkpoint does not load.
    """
    began = time.perf_counter()

    def origin(kind: str, note: str = "") -> Origin:
        return Origin(kind, time.perf_counter() - began, note)

    if store is None:
        return _in_memory(job, tell), origin("quantized")
    try:
        ensure_checksums()
        key = entry_key(job, store.digests, lambda: tell(0, 1))
        with suppress(DamagedEntry):  # seen to below, where nobody else mends it meanwhile
            if (model := _from_store(job, store, key)) is not None:
                return model, origin("store")
        with store.alone(key, lambda: tell(0, 1)):
            try:
                if (model := _from_store(job, store, key)) is not None:  # another process has made it meanwhile
                    return model, origin("store")
            except DamagedEntry as error:
                store.set_aside(key, one_sentence(error))
            _store(job, store, key, tell)
            if (model := _from_store(job, store, key, verify=False)) is not None:
                return model, origin("stored")
        note = "it was gone before it could be read"
    except StoreError as error:
        note = one_sentence(error)
        logger.warning("%s as %s is not stored: %s.", job.info.name, job.spec, note)
    return _in_memory(job, tell), origin("quantized", note)


def _in_memory(job: Job, tell: Tell) -> nn.Module:
    model = read_mapped(job.info, job.dtype, job.files)
    for name, layer in quantized_layers(model, job.layers, job.backend, tell):
        model.set_submodule(name, layer)
    return cast(model, job.dtype)


def _from_store(job: Job, store: Store, key: Key, verify: bool = True) -> nn.Module | None:
    entry = store.find(key, verify)
    if entry is None:
        return None
    try:
        model = read_entry(job, entry)
    except Exception as error:  # whatever a library makes of an entry that another of its versions wrote
        entry.hold.close()
        if is_out_of_memory(error):
            raise
        raise DamagedEntry(one_sentence(error)) from error
    weakref.finalize(model, entry.hold.close).atexit = False
    return model


def _store(job: Job, store: Store, key: Key, tell: Tell) -> None:
    model = read_mapped(job.info, job.dtype, job.files)
    with store.writing(key, entry_bytes(model, job)) as folder:
        if job.backend.save:
            cast(model, job.dtype, but=job.layers)
            job.backend.save(folder, model, job.dtype, job.layers, tell)
        else:
            write_entry(folder, model, job, tell)
        if entry_key(job, store.digests, lambda: tell(1, 1)) != key:
            raise StoreError("its checkpoint changed meanwhile")
    del model
    give_back()
