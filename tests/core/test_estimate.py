"""What a plan is said to cost before it is loaded, against what it then costs."""

import json

import pytest
import torch

from quant_core import (
    GenerateRequest,
    LoadRequest,
    Placement,
    SpecError,
    activations,
    backends,
    estimate,
    estimate_data,
    fitting,
    footprint,
    forecast,
    format_estimate,
    format_plan,
    generate,
    load_pipeline,
    parse_plan,
    peak_data,
    peak_report,
    what_fits,
)
from quant_core.__main__ import main
from quant_core.errors import gib
from quant_core.peak import measured

from .measured import measured_activations
from .test_footprint import SCHEMES
from .test_layers_left_out import EACH

MORE = ["gguf/Q5_0", "gguf/Q4_1", "torchao/int8wo?group_size=64", "transformer=torchao/int8wo?skip=**.proj_out"]
SMALL = {"width": 128, "height": 128, "steps": 2}
TINY = {"wan": {"width": 32, "height": 32, "extra": {"num_frames": 5}}}


def load_request(scheme, source="demo", **settings):
    return LoadRequest(str(source), parse_plan(scheme), **settings)


def assert_footprints(load, request):
    found, pipeline = estimate(load, request), load_pipeline(load)
    assert [part.name for part in found.components] == list(pipeline.models)
    for part in found.components:
        real = footprint(pipeline.models[part.name])
        assert abs(part.footprint - real) <= 0.001 * real, part.name
        assert part.quantization == str(pipeline.specs.get(part.name, ""))
    return found, pipeline


@pytest.mark.parametrize("scheme", ["none", *SCHEMES, *MORE])
def test_footprints_and_peaks_are_those_of_the_pipeline_that_is_loaded(scheme):
    request = GenerateRequest("a lake at noon", **SMALL)
    found, pipeline = assert_footprints(load_request(scheme), request)
    real = {name: footprint(module) for name, module in pipeline.models.items()}
    taken = measured_activations(pipeline, request)
    assert found.peak_resident == pytest.approx(sum(real.values()) + max(taken.values()), rel=0.1)
    assert found.peak_in_turn == pytest.approx(max(real[name] + taken[name] for name in taken), rel=0.1)
    for part in found.components:
        slack = 64 * 2**10  # scratch of the CPU's attention and matrix kernels, which a small text encoder shows
        assert part.activations == pytest.approx(taken[part.name], rel=0.1, abs=slack), part.name
    assert (found.coarse, found.image) == ("", (128, 128))
    assert activations(pipeline, request) == {part.name: part.activations for part in found.components}


OTHERS = [
    ("none", "bfloat16", {"width": 256, "height": 192}),
    ("torchao/int8wo", "bfloat16", {"width": 256, "height": 192, "images_per_prompt": 2}),
    ("gguf/Q4_0", "bfloat16", {"width": 128, "height": 128, "extra": {"true_cfg_scale": 3.0}}),
    ("bitsandbytes_8bit/int8", "float16", {"width": 128, "height": 192}),
    ("quanto/float8", "float32", {"width": 256, "height": 192, "images_per_prompt": 2}),
]


@pytest.mark.parametrize(("scheme", "dtype", "settings"), OTHERS)
def test_peaks_follow_size_batch_and_dtype(scheme, dtype, settings):
    request = GenerateRequest("a lake at noon", steps=1, **settings)
    found, pipeline = assert_footprints(load_request(scheme, dtype=dtype), request)
    taken = measured_activations(pipeline, request)
    weights = sum(map(footprint, pipeline.models.values()))
    assert found.peak_resident == pytest.approx(weights + max(taken.values()), rel=0.1)
    for name in ("transformer", "vae"):
        (part,) = [part for part in found.components if part.name == name]
        assert part.activations == pytest.approx(taken[name], rel=0.1), name


@pytest.mark.parametrize("scheme", EACH)
@pytest.mark.parametrize("name", ["sd3", "wan", "zimage"])
def test_layers_left_out_are_estimated_as_they_stay(tiny, name, scheme):
    settings = TINY.get(name, {"width": 64, "height": 64})
    plan = f"transformer={scheme}"
    found, _ = assert_footprints(load_request(plan, tiny(name)), GenerateRequest("a cat", steps=2, **settings))
    assert found.coarse == ""


@pytest.mark.parametrize("name", ["sd3", "wan", "zimage", "sd", "pixart"])
def test_every_kind_of_pipeline_has_a_peak(tiny, name):
    settings = TINY.get(name, {"width": 64, "height": 64})
    if name == "pixart":
        settings = {"extra": {"use_resolution_binning": False}, "width": 64, "height": 64}
    request = GenerateRequest("a cat", steps=2, **settings)
    found = estimate(load_request("none", tiny(name)), request)
    pipeline = load_pipeline(load_request("none", tiny(name)))
    taken = measured_activations(pipeline, request)
    weights = sum(map(footprint, pipeline.models.values()))
    assert found.peak_resident == pytest.approx(weights + max(taken.values()), rel=0.1)


def test_a_safety_checker_that_reads_its_numbers_is_said_to_be_coarse(tiny):
    found = estimate(load_request("none", tiny("sd")), GenerateRequest("a cat", width=64, height=64, steps=2))
    assert {part.name for part in found.components if part.is_coarse} == {"safety_checker"}
    assert found.coarse.startswith("The dry run ended early in safety_checker (")
    assert found.coarse in format_estimate(found)


CUDA = [f"torchao/{scheme.name}" for scheme in backends()["torchao"].schemes if scheme.devices == ("cuda",)]


@pytest.mark.parametrize("scheme", CUDA)
def test_a_scheme_for_gpus_is_estimated_without_one(scheme):
    found = estimate(load_request(f"transformer={scheme}", device="cuda"), GenerateRequest("a", **SMALL))
    (part,) = [part for part in found.components if part.name == "transformer"]
    bits = backends()["torchao"].scheme(scheme.split("/")[1]).bits
    most = 1 if scheme == "torchao/int4wo" else bits / 16 + 0.12  # its tiles are 4 times as wide as the demo's layers
    assert bits / 16 < part.footprint / part.bytes_16bit < most


def test_a_ready_gguf_file_is_estimated_by_what_it_holds(made):
    pipeline, file = made("transformer")
    found = estimate(load_request(f"transformer=gguf/file?path={file}"), GenerateRequest("a", **SMALL))
    (part,) = [part for part in found.components if part.name == "transformer"]
    assert part.footprint == footprint(pipeline.pipe.transformer)


def test_tiling_of_a_loaded_pipeline_counts():
    pipeline = load_pipeline(load_request("none"))
    request = GenerateRequest("a", width=512, height=512, steps=1)
    whole = activations(pipeline, request)
    pipeline.pipe.vae.enable_tiling()
    tiled = activations(pipeline, request)
    assert tiled["vae"] < whole["vae"] / 2 and tiled["transformer"] == whole["transformer"]


def test_an_unset_size_is_the_pipeline_s_own():
    request = GenerateRequest("a", steps=1)
    found = estimate(load_request("none"), request)
    assert found.image == (1024, 1024)
    same = estimate(load_request("none"), GenerateRequest("a", width=1024, height=1024, steps=1))
    assert same == found


def test_a_request_that_generate_refuses_is_refused():
    with pytest.raises(SpecError, match="FluxPipeline takes no fps"):
        estimate(load_request("none"), GenerateRequest("a", extra={"fps": 1}))


def test_what_would_fit_really_does():
    load, request = load_request("none"), GenerateRequest("a", width=512, height=512, steps=1)
    found = estimate(load, request)
    assert what_fits(found, load, request, found.peak_resident).endswith("with all components on the device.")
    assert "only the component in use" in what_fits(found, load, request, found.peak_in_turn)
    assert found.peak_streamed < found.peak_in_turn
    assert "streamed block by block" in what_fits(found, load, request, found.peak_streamed)
    said = what_fits(found, load, request, found.peak_streamed - 1)
    smaller = estimate(load, GenerateRequest("a", width=384, height=384, steps=1))
    assert f"needs at least {gib(found.peak_streamed)}, streamed block by block; what would fit: " in said
    assert f"this plan at 384 x 384 ({gib(smaller.peak_streamed)})" in said
    assert smaller.peak_streamed < found.peak_streamed


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q4_0", "quanto/int4"])
def test_what_is_streamed_is_what_a_placement_holds_at_least(plan):
    found = {part.name: part for part in estimate(load_request(plan), GenerateRequest("a", width=64)).components}
    pipeline = load_pipeline(load_request(plan))
    for name, module in pipeline.models.items():
        placement = Placement(module, torch.device("cpu", 0), torch.device("cpu"))
        least = placement.size if placement.why_whole else placement.least
        assert abs(found[name].streamed - least) <= 0.01 * least, name


@pytest.fixture
def looked_at(monkeypatch):
    """(width, height, plan) of each further estimate that is made to find what fits."""
    asked = []

    def recorded(load, request, tiled=False):
        if not tiled:
            asked.append((request.width, request.height, format_plan(load.plan)))
        return estimate(load, request, tiled)

    monkeypatch.setattr(fitting, "estimate", recorded)
    return asked


def test_a_budget_that_nothing_fits_into_is_told_the_least_that_is_needed(looked_at):
    load, request = load_request("none"), GenerateRequest("a", width=512, height=512, steps=1)
    found, least = (estimate(load, GenerateRequest("a", width=side, height=side, steps=1)) for side in (512, 128))
    assert what_fits(found, load, request, 2**20) == (
        f"It does not fit into 1.00 MiB: it needs at least {gib(found.peak_streamed)}, streamed block by block, and "
        f"nothing that was tried fits; nearest comes this plan at 128 x 128 ({gib(least.peak_streamed)})."
    )
    assert looked_at == [(128, 128, "none")]  # a larger size, or a plan that leaves the decoder as it is, cannot fit


def test_sizes_are_tried_from_the_smallest_as_far_as_they_fit(looked_at):
    load, request = load_request("none"), GenerateRequest("a", width=512, height=512, steps=1)
    found, half = (estimate(load, GenerateRequest("a", width=side, height=side, steps=1)) for side in (512, 256))
    assert "this plan at 256 x 256" in what_fits(found, load, request, half.peak_streamed)
    assert looked_at == [(side, side, "none") for side in (128, 192, 256, 384)]


def test_tiles_are_offered_where_the_decode_fits_in_them():
    load, request = load_request("none"), GenerateRequest("a", width=256, height=256, steps=1)
    whole, tiled = estimate(load, request), estimate(load, request, tiled=True)
    assert [part.name for part in whole.components if part not in tiled.components] == ["vae"]
    said = what_fits(whole, load, request, tiled.peak_streamed)
    words = "this plan at this size with its decode in tiles, as ComfyUI then runs it"
    assert f"; what would fit: {words} ({gib(tiled.peak_streamed)})" in said
    assert words not in what_fits(whole, load, request, tiled.peak_streamed - 1)


def test_a_plan_is_offered_where_the_size_is_as_small_as_it_can_be(looked_at):
    load, request = load_request("none"), GenerateRequest("a", width=64, height=64, steps=1)
    found = estimate(load, request)
    smaller = estimate(load_request("torchao/int8wo"), request)
    said = what_fits(found, load, request, smaller.peak_streamed)
    assert said.endswith(f"what would fit: torchao/int8wo at this size ({gib(smaller.peak_streamed)}).")
    assert looked_at == [(64, 64, "torchao/int8wo")]


BUDGETS = [("8G", 8 * 2**30), ("8gib", 8 * 2**30), ("8 GB", 8 * 10**9), ("8gb", 8 * 10**9)]
BUDGETS += [("1.5m", 3 * 2**19), ("1.5MiB", 3 * 2**19), ("12Mb", 12 * 10**6)]


@pytest.mark.parametrize(("text", "size"), BUDGETS)
def test_a_budget_is_written_as_one_likes(text, size, capsys):
    assert main(["estimate", "demo", "--width", "64", "--height", "64", "--json", "--budget", text]) == 0
    assert json.loads(capsys.readouterr().out)["budget"] == size


def test_the_command_line_prints_a_table_or_json(capsys):
    arguments = ["estimate", "demo", "--plan", "torchao/int8wo", "--width", "128", "--height", "128"]
    assert main([*arguments, "--json", "--budget", "1GiB"]) == 0
    told = json.loads(capsys.readouterr().out)
    expected = estimate(
        load_request("torchao/int8wo"), GenerateRequest(" ".join(["word"] * 60), width=128, height=128)
    )
    assert {**told, "image": tuple(told["image"])}.items() >= {
        key: value for key, value in estimate_data(expected).items() if key != "components"
    }.items()
    assert told["fits"] is True
    assert told["advice"] == "It fits into 1.00 GiB with all components on the device."
    assert main([*arguments, "--json", "--budget", "1M"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False and told["advice"].startswith("It does not fit into 1.00 MiB: it needs at least ")
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == format_estimate(expected)
    assert main([*arguments, "--budget", "1GiB"]) == 0
    assert capsys.readouterr().out.endswith("\nIt fits into 1.00 GiB with all components on the device.\n")


def test_nothing_is_read_of_the_weights(copy):
    folder = copy("sd3")
    for file in folder.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        start = 8 + int.from_bytes(data[:8], "little")
        data[start:] = bytes(len(data) - start)  # zeros
        file.write_bytes(data)
    request = GenerateRequest("a cat", width=64, height=64, steps=2)
    with torch.inference_mode():
        found = estimate(load_request("torchao/int8wo", folder), request)
    assert found.coarse == "" and found.peak_in_turn > 0


@pytest.fixture
def promptless(tmp_path):
    """A pipeline that makes pictures of nothing."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    blocks = {"block_out_channels": (32,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(sample_size=16, layers_per_block=1, **blocks)
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "ddpm")
    return str(tmp_path / "ddpm")


def test_a_forecast_says_what_a_load_and_a_run_will_take(promptless):
    found = estimate(load_request("torchao/int8wo"), GenerateRequest(" ".join(["word"] * 60)))
    text = forecast(load_request("torchao/int8wo"))
    peaks = (found.peak_resident, found.peak_in_turn, found.peak_streamed)
    assert all(gib(size) in text for size in peaks) and "{} x {}".format(*found.image) in text
    assert "what would fit" not in text and "what would fit" in forecast(load_request("none"), found.peak_streamed - 1)
    assert forecast(LoadRequest(promptless)) == ""
    assert forecast(load_request("unet=torchao/int8wo")) == ""  # the load itself says why


FIRST = "weights and process growth, first run: warm-up included"
LATER = "weights and process growth, later run: without the heap that earlier ones left"


def test_the_estimate_stands_next_to_what_the_last_run_took(promptless):
    pipeline = load_pipeline(load_request("torchao/int8wo"))
    assert "its default size" in str(peak_report(pipeline)) and peak_report(pipeline).measured is None
    request = GenerateRequest("a lake", width=128, height=128, steps=2)
    generate(pipeline, request)
    report = peak_report(pipeline)
    used = activations(pipeline, request)
    weights = {name: footprint(module) for name, module in pipeline.models.items()}
    assert report.resident == sum(weights.values()) + max(used.values())
    assert report.in_turn == max(size + used[name] for name, size in weights.items())
    if report.measured is not None:  # where the system tells
        assert report.measured >= sum(weights.values())
        assert f"the last run took {gib(report.measured)} ({report.measured_meaning})" in str(report)
        assert peak_data(report).items() >= {"measured": report.measured, "measured_meaning": FIRST}.items()
        generate(pipeline, request)
        assert peak_report(pipeline).measured_meaning == LATER
    assert peak_report(load_pipeline(LoadRequest(promptless))) is None


def test_on_a_gpu_the_measure_is_pytorch_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 10)
    with measured(torch.device("cuda"), is_first=True) as peak:
        pass
    assert (peak.extra, peak.meaning) == (7, "PyTorch's memory on the GPU")
