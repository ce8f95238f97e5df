"""Results leave a GPU while Python goes on; on the CPU nothing is between."""

import pytest
import torch

from quant_core import QuantError, generate, generation, sending

from .small_requests import load, small


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and lets nobody look at its values."""

    @property
    def device(self):
        return torch.device("cuda", 0)

    def __bool__(self):
        raise AssertionError("the GPU was waited for")

    def cpu(self):
        raise AssertionError("the GPU was waited for")


class Events(list):
    """A GPU that copies when it is waited for."""

    def __init__(self, monkeypatch, fails=False):
        self.fails = fails
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **more: self.made(empty(*args, **more)))
        monkeypatch.setattr(
            torch.Tensor, "copy_", lambda place, tensor, non_blocking: self.copied(place, tensor, non_blocking)
        )
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self)
        self.pending = []

    def made(self, tensor):
        if self.fails:
            raise RuntimeError("no more memory can be locked")
        self.append("locked")
        return tensor

    def copied(self, place, tensor, non_blocking):
        assert non_blocking
        self.append("sent")
        self.pending.append((place, tensor.as_subclass(torch.Tensor)))

    def record_event(self):
        self.append("recorded")
        return self

    def synchronize(self):
        self.append("waited")
        for place, tensor in self.pending:
            place.set_(tensor.clone())


def test_on_the_cpu_it_is_there_at_once():
    images, flag = torch.rand(1, 4, 4, 3), torch.tensor(True)
    found = sending.send(images, flag)()
    assert found[0] is images and found[1] is flag


def test_from_a_gpu_it_is_waited_for_only_when_it_is_asked_for(monkeypatch):
    torch.manual_seed(0)
    images = torch.rand(1, 4, 4, 3)
    events = Events(monkeypatch)
    receive = sending.send(images.as_subclass(OnGpu), torch.tensor(True).as_subclass(OnGpu))
    assert events == ["locked", "locked", "sent", "sent", "recorded"]
    found, flag = receive()
    assert events[5:] == ["waited"] and torch.equal(found, images) and bool(flag)


@pytest.mark.parametrize("why", ["too large", "not allowed"])
def test_what_cannot_be_locked_is_copied_as_ever(monkeypatch, why):
    if why == "too large":
        monkeypatch.setattr(sending, "_LIMIT", 10)
    events = Events(monkeypatch, fails=why == "not allowed")
    with pytest.raises(AssertionError, match="waited for"):  # by `cpu`, of the stand-in
        sending.send(torch.zeros(4).as_subclass(OnGpu))
    assert events == []


def note_cleaning(monkeypatch, events):
    """Once for all components of a run."""
    clean = generation.forget_cached

    def cleaned(modules):
        if events[-1:] != ["cleaned"]:
            events.append("cleaned")
        clean(modules)

    monkeypatch.setattr(generation, "forget_cached", cleaned)


@pytest.mark.parametrize("output", ["images", "latents"])
def test_a_run_is_cleaned_up_before_it_waits(tiny, monkeypatch, output):
    pipeline, events = load(tiny, "sd3"), []
    expected = generate(pipeline, small("sd3", output=output))
    send = generation.send

    def sending_late(*tensors):
        events.append("sent")
        receive = send(*tensors)
        return lambda: events.append("received") or receive()

    monkeypatch.setattr(generation, "send", sending_late)
    note_cleaning(monkeypatch, events)
    assert torch.equal(generate(pipeline, small("sd3", output=output)), expected)
    assert events == ["sent", "cleaned", "received"]


def test_no_picture_but_nan_is_an_error_after_all_is_cleaned_up(tiny, monkeypatch):
    pipeline, events = load(tiny, "sd3"), []
    note_cleaning(monkeypatch, events)
    pipeline.pipe.vae.decoder.register_forward_hook(lambda *args: args[-1] * torch.nan)
    with pytest.raises(QuantError, match="no picture but NaN"):
        generate(pipeline, small("sd3"))
    assert events == ["cleaned"]
    latents = generate(pipeline, small("sd3", output="latents"))
    assert latents.isfinite().all()
