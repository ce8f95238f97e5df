"""What components of a loaded pipeline really take while it runs on the CPU: PyTorch's own record of allocations."""

import functools

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_flatten

from quant_core import generate


def peak_of(call):
    """(result, most bytes allocated at once during the call), allocations inside of operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        result = call()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return result, peak


def bytes_of(value):
    """Of the storages of all tensors in a structure."""
    storages = [leaf.untyped_storage() for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measured_activations(pipeline, request):
    """Component -> the most bytes that one use of it took, its inputs included, over a run of the pipeline."""
    peaks, inside = {}, []

    def measured(name, method):
        @functools.wraps(method)
        def use(*args, **kwargs):
            if inside:
                return method(*args, **kwargs)
            inside.append(name)
            try:
                result, peak = peak_of(lambda: method(*args, **kwargs))
            finally:
                inside.clear()
            peaks[name] = max(peaks.get(name, 0), peak + bytes_of((args, kwargs)))
            return result

        return use

    wrapped = [
        (name, model, entry)
        for name, model in pipeline.models.items()
        for entry in ("forward", "encode", "decode")
        if hasattr(model, entry)
    ]
    for name, model, entry in wrapped:
        setattr(model, entry, measured(name, getattr(model, entry)))
    try:
        generate(pipeline, request)
    finally:
        for _, model, entry in wrapped:
            delattr(model, entry)
    return peaks
