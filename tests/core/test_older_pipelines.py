"""Families that do something in a way of their own load and run with every kind of layer, or say why they cannot."""

import inspect
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from quant_core import (
    GenerateRequest,
    LoadRequest,
    SpecError,
    generate,
    inspect_pipeline,
    load_pipeline,
    needs,
    parse_plan,
)
from quant_core.backends import backends, get_backend
from quant_core.sizes import check_sizes
from quant_core.tiling import knows_only_tiles

from .simulated_device import Card, manage, resident
from .small_requests import load, small
from .test_moving import SCHEMES

PLANS = ["torchao/int8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0"]
REQUESTS = {
    "allegro": {"side": 32, "max_sequence_length": 16, "extra": {"num_frames": 24, "clean_caption": False}},
    "animatediff": {"side": 16, "extra": {"num_frames": 2}},
    "hunyuandit": {"side": 16, "extra": {"use_resolution_binning": False}},
    "kandinsky22": {"side": 64, "extra": {"prior_num_inference_steps": 2}},
    "ldm": {"side": 32},
}


def request(name, **more):
    settings = dict(REQUESTS[name])
    side = settings.pop("side")
    return GenerateRequest("a cat", width=side, height=side, steps=2, **settings, **more)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", REQUESTS)
def test_it_loads_and_runs(tiny, name, plan):
    pipeline = load_pipeline(LoadRequest(str(tiny(name)), parse_plan(plan)))
    reports = {report.name: report for report in inspect_pipeline(pipeline)}
    denoiser = next(part for part in ("transformer", "unet") if part in reports)
    assert sum(reports[denoiser].formats.values()) > 10, "layers are quantized"
    images = generate(pipeline, request(name))
    frames, side = REQUESTS[name].get("extra", {}).get("num_frames", 1), REQUESTS[name]["side"]
    assert images.shape == (frames, side, side, 3) and images.isfinite().all() and images.std() > 0
    assert torch.equal(generate(pipeline, request(name, remember=False)), images)


def test_what_a_pipeline_of_two_stages_needs_is_seen_without_running_it(tiny):
    pipeline, card = load(tiny, "kandinsky22"), Card()
    expected = generate(pipeline, request("kandinsky22"))
    used = manage(pipeline, card)
    found = needs(pipeline, request("kandinsky22"))
    assert used == [] and card.copied == 0
    assert all(found[name] > 0 for name in ("prior_prior", "prior_text_encoder", "unet", "movq"))
    assert torch.equal(generate(pipeline, request("kandinsky22")), expected) and card.used == resident(pipeline)


@pytest.mark.parametrize("plan", PLANS)
def test_a_pipeline_that_makes_no_picture_says_so_before_it_runs(tiny, plan):
    pipeline = load_pipeline(LoadRequest(str(tiny("stablecascade")), parse_plan(plan)))
    with pytest.raises(SpecError, match="^StableCascadePriorPipeline makes neither images nor video but"):
        generate(pipeline, GenerateRequest("a cat", width=128, height=128, steps=2))


class Longless(diffusers.DDIMScheduler):
    """As DDPMWuerstchenScheduler, which looks for its length in the wrong place."""

    def __len__(self):
        return self.config.num_timesteps_of_training


def test_a_scheduler_is_not_asked_for_its_length(tiny):
    pipeline = load(tiny, "sd")
    expected = generate(pipeline, small("sd"))
    pipeline.pipe.scheduler = Longless.from_config(pipeline.pipe.scheduler.config)
    steps = pipeline.pipe.scheduler.num_inference_steps
    assert torch.equal(generate(pipeline, small("sd")), expected)
    assert pipeline.pipe.scheduler.num_inference_steps == steps


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES if scheme != "none"])
def test_a_layer_takes_its_input_by_the_name_that_torch_gives_it(scheme):
    spec = parse_plan(scheme).default
    backend = get_backend(spec.backend)
    linear = nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    recipe = spec.recipes(torch.bfloat16, torch.device("cpu"))[spec.scheme]
    layer, values = backend.quantize(linear, recipe), torch.ones(2, 64, dtype=torch.bfloat16)
    assert torch.equal(layer(input=values), layer(values))
    assert list(inspect.signature(layer.forward).parameters) == ["input"]


def test_every_backend_is_among_these():
    assert {parse_plan(scheme).default.backend for scheme in SCHEMES if scheme != "none"} == set(backends())


def test_a_vae_that_decodes_in_tiles_alone_works_in_tiles_for_the_run_and_says_so(tiny):
    pipeline = load(tiny, "allegro")
    vae = pipeline.pipe.vae
    assert knows_only_tiles(vae) and not vae.use_tiling
    generate(pipeline, request("allegro"))
    assert not vae.use_tiling
    assert pipeline.notices == ["vae works in tiles in this run, as AutoencoderKLAllegro decodes in no other way."]
    hook = vae.decoder.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, request("allegro"))
    hook.remove()
    assert not vae.use_tiling


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"width": 512}, "width is 512; AllegroPipeline decodes in tiles of 320 and 240 more each: 320 or 560."),
        ({"height": 64}, "height is 64; AllegroPipeline decodes in tiles of 320 and 200 more each: 320."),
        ({"num_frames": 48}, "num_frames is 48; AllegroPipeline decodes in tiles of 24 and 16 more each: 40 or 56."),
        ({"width": 1280, "height": 720, "num_frames": 88}, ""),
    ],
)
def test_a_size_that_tiles_do_not_fill_is_refused(sizes, sentence):
    """What they leave would be grey."""
    pipe = SimpleNamespace(vae=SimpleNamespace(kernel=(24, 320, 320), stride=(16, 200, 240)))
    pipe = type("AllegroPipeline", (SimpleNamespace,), {"__call__": lambda self: None})(**vars(pipe))
    if not sentence:
        return check_sizes(pipe, sizes, {})
    with pytest.raises(SpecError) as raised:
        check_sizes(pipe, sizes, {})
    assert str(raised.value) == sentence


def test_other_vaes_know_more_than_tiles():
    names = [name for name in dir(diffusers) if name.startswith("Autoencoder") and "Allegro" not in name]
    assert len(names) > 20
    for name in names:
        model = object.__new__(getattr(diffusers, name))
        assert not knows_only_tiles(model), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_arrays_have_the_values_of_the_pipeline_s_dtype(tiny, dtype):
    pipeline = load_pipeline(LoadRequest(str(tiny("ldm")), dtype=dtype))
    seen = []
    decode = pipeline.pipe.vqvae.decode
    pipeline.pipe.vqvae.decode = lambda *args: seen.append(decode(*args)) or seen[-1]
    images = generate(pipeline, request("ldm"))
    (made,) = [output.sample for output in seen]
    assert str(made.dtype) == f"torch.{dtype}"
    assert torch.equal(images, (made / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float())
