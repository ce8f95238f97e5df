"""Pace and progress as text, and a load that tells how far it is after each layer and stops when told to."""

import gc
import weakref

import pytest

from quant_core import LoadRequest, Pace, bytes_done, load_pipeline, parse_plan, reading
from quant_core.progress import duration


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def paced(*seconds, total):
    """The pace after steps that took so many seconds."""
    clock = Clock()
    pace = Pace(clock)
    for done, took in enumerate(seconds, 1):
        clock.now += took
        pace.update(done, total)
    return pace


@pytest.mark.parametrize(
    ("seconds", "total", "text"),
    [
        ([40.0], 28, "1/28"),  # of which most may be the text encoder's
        ([40.0] + [0.5] * 3, 28, "4/28, 2.00 steps/s, 12 s left"),
        ([0.7] * 12, 28, "12/28, 1.43 steps/s, 11 s left"),
        ([90.0] * 2, 50, "2/50, 90.00 s/step, 1 h 12 min left"),
        ([1.0] * 10, 10, "10/10, 1.00 steps/s, 0.0 s left"),
    ],
)
def test_the_rate_is_that_of_the_steps_after_the_first(seconds, total, text):
    assert str(paced(*seconds, total=total)) == text


def test_the_summary_counts_the_whole_run_and_rates_the_steps_after_the_first():
    assert paced(30.0, *[0.5] * 11, total=12).summary == "12 steps in 36 s, 2.00 steps/s"
    assert paced(0.25, total=1).summary == "1 step in 0.2 s"


def test_a_second_stage_that_counts_from_one_again_starts_a_new_rate():
    clock = Clock()
    pace = Pace(clock)
    for done, took in ((1, 1), (2, 1), (1, 5), (2, 2), (3, 2)):
        clock.now += took
        pace.update(done, 4)
    assert str(pace) == "3/4, 2.00 s/step, 2.0 s left"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_bytes_are_told_in_the_unit_of_the_whole():
    assert bytes_done(3_100_000_000, 23_800_000_000) == "3.1 of 23.8 GB"
    assert bytes_done(0, 26_500_000) == "0.0 of 26.5 MB"


PLANS = ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0", "transformer=quanto/int8"]


@pytest.mark.parametrize("plan", PLANS)
def test_a_load_tells_each_layer_in_bytes_of_the_files(tiny, tmp_path, plan):
    folder = tiny("sd3")
    sizes = {part.name: sum(file.stat().st_size for file in part.glob("*.safetensors")) for part in folder.iterdir()}
    seen = []
    request = LoadRequest(str(folder), parse_plan(plan), store=tmp_path)
    pipeline = load_pipeline(request, lambda *told: seen.append(told))
    assert {total for _, total, _ in seen} == {sum(sizes.values())}
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[0][0] == 0 and seen[-1] == (sum(sizes.values()), sum(sizes.values()), "")
    order = list(dict.fromkeys(name for _, _, name in seen))
    assert order == ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae", ""]
    for name in order[:-1]:
        told = [done for done, _, component in seen if component == name]
        layers = len([module for module in pipeline.models[name].modules() if hasattr(module, "in_features")])
        assert len(told) > layers / 2 if name in pipeline.specs else len(told) == 1
        assert told[-1] - told[0] == (sizes[name] if name in pipeline.specs else 0)


def test_a_ready_gguf_file_counts_with_its_own_size(made, tmp_path):
    _, file = made("transformer")
    seen = []
    load_pipeline(
        LoadRequest("demo", parse_plan(f"transformer=gguf/file?path={file}")), lambda *told: seen.append(told)
    )
    told = [done for done, _, name in seen if name == "transformer"]
    assert len(told) > 50 and told[-1] - told[0] == file.stat().st_size


@pytest.mark.parametrize("plan", ["torchao/int8wo", "gguf/Q4_0"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_load_can_be_stopped_at_any_layer_and_frees_what_it_had(tiny, tmp_path, monkeypatch, plan, error):
    read, modules, told = reading.read_weights, [], []

    def watched(*arguments):
        module = read(*arguments)
        modules.append(weakref.ref(module))
        return module

    def stop(done, total, name):
        told.append(done)
        if len(told) == 4:
            raise error

    monkeypatch.setattr(reading, "read_weights", watched)
    with pytest.raises(error):
        load_pipeline(LoadRequest(str(tiny("sd3")), parse_plan(plan), store=tmp_path), stop)
    assert len(told) == 4 and len(modules) == 1
    gc.collect()
    assert modules[0]() is None
    assert [path for path in tmp_path.iterdir() if path.name not in (".locks", ".digests")] == []  # nothing half made
