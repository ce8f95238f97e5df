"""Previews show what will be finished, whatever the layout of the latents, and cost what they may."""

import gc
import weakref
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch.nn import functional

from quant_core import GenerateRequest, LoadRequest, Preview, Step, generate, latent_rgb, load_pipeline
from quant_core import preview as preview_module
from quant_core.latents import first_frame, foresee, grid
from quant_core.preview import SHARE, Budget, LatentRGB

SIZES = {"demo": 128, "sd": 16, "sd3": 16, "wan": 32, "zimage": 32}
NIGHT = GenerateRequest(
    "a red house on the left, three pine trees, snowy mountains, a full moon at night, a clear sky",
    width=128,
    height=128,
    steps=12,
    seed=7,
    extra={"true_cfg_scale": 3.0},
)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class NoLimit(Budget):
    def allows(self):
        return True


@pytest.fixture(scope="module")
def load(tiny):
    return lambda name: load_pipeline(LoadRequest(name if name == "demo" else str(tiny(name))))


@pytest.fixture(scope="module")
def night(load):
    """The demo's latents after each step, what was told of the finished ones, the previews, and the picture."""
    pipeline = load("demo")
    noisy, told, pictures = [], [], []
    preview = Preview(pipeline, NIGHT, lambda latents: told.append(latents.float()), budget=NoLimit())

    def on_step(step):
        noisy.append(first_frame(step.latents, 16, (8, 8)).float())
        preview(step)
        pictures.append(latent_rgb(pipeline)(told[-1]))

    image = generate(pipeline, NIGHT, on_step)[0]
    return SimpleNamespace(noisy=noisy, told=told, pictures=pictures, image=image)


def test_each_step_tells_more_of_the_finished_latents_than_it_has(night):
    final = night.noisy[-1]
    assert torch.equal(night.told[-1], final) and len(night.told) == 12
    errors = [(told - final).pow(2).mean().sqrt().item() for told in night.told]
    noise = [(noisy - final).pow(2).mean().sqrt().item() for noisy in night.noisy]
    assert all(error < 0.9 * left for error, left in zip(errors[:-1], noise[:-1], strict=True))
    assert errors == sorted(errors, reverse=True)
    assert errors[5] < 0.4 * noise[5]  # halfway through; measured 0.24


def likeness(picture, image):
    """Correlation of a preview with the finished picture at its size."""
    small = functional.adaptive_avg_pool2d(image.movedim(-1, 0)[None], picture.shape[:2])[0].movedim(0, -1)
    pair = torch.stack([picture.float().flatten(), small.flatten()])
    return torch.corrcoef(pair)[0, 1].item()


def test_previews_resemble_the_finished_picture(night):
    likenesses = [likeness(picture, night.image) for picture in night.pictures]
    assert night.pictures[-1].shape == (16, 16, 3) and night.pictures[-1].dtype == torch.uint8
    assert likenesses[-1] > 0.7 and likenesses[5] > 0.7  # measured 0.86 and 0.85
    assert likenesses[0] < 0.3  # noise
    mirrored = night.pictures[-1].flip(1)
    assert likenesses[-1] > likeness(mirrored, night.image) + 0.1


def test_the_map_tells_colours_that_the_vae_has_seen(load):
    """Of flat pictures that it was not learned from, coloured as the demo paints."""
    pipeline = load("demo")
    colours = torch.tensor([[0.1, 0.1, 0.3], [0.5, 0.7, 0.9], [0.9, 0.85, 0.7], [0.2, 0.4, 0.2]])
    pictures = colours[:, :, None, None].expand(-1, 3, 64, 64)
    vae = pipeline.pipe.vae
    with torch.no_grad():
        latents = vae.encode((pictures * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    found = torch.stack([latent_rgb(pipeline)(latent).float().mean((0, 1)) for latent in latents]) / 255
    assert torch.corrcoef(torch.stack([found.flatten(), colours.flatten()]))[0, 1] > 0.75  # measured 0.87


@pytest.mark.parametrize("name", SIZES)
def test_any_pipeline_has_a_preview_of_each_step(load, name):
    pipeline = load(name)
    side = SIZES[name]
    extra = {"num_frames": 5} if name == "wan" else {}
    request = GenerateRequest("a cat", width=side, height=side, steps=3, extra=extra)
    preview = Preview(pipeline, request, latent_rgb(pipeline), budget=NoLimit())
    pictures = []
    generate(pipeline, request, lambda step: pictures.append(preview(step)))
    latents = 8 * side // {"demo": 64, "sd": 16, "sd3": 16, "wan": 64, "zimage": 16}[name]
    assert [picture.shape for picture in pictures] == [(latents, latents, 3)] * 3
    assert latent_rgb(pipeline).weight.isfinite().all() and len({picture.sum().item() for picture in pictures}) > 1


@pytest.mark.parametrize(
    ("config", "buffers", "expected"),
    [
        ({"scaling_factor": 0.5, "shift_factor": None}, {}, [2.0, 4.0]),
        ({"scaling_factor": 0.5, "shift_factor": 2.0}, {}, [1.0, 3.0]),  # Flux, SD 3
        ({"latents_mean": [1.0, 2.0], "latents_std": [2.0, 3.0]}, {}, [1.5, 2.0]),  # Wan, Qwen-Image
        ({"latents_mean": [1.0, 2.0], "latents_std": [2.0, 3.0], "scaling_factor": 0.5}, {}, [0.75, 1.0]),  # Mochi
        ({"scaling_factor": 1.0}, {"latents_mean": [1.0, 2.0], "latents_std": [2.0, 3.0]}, [1.5, 2.0]),  # LTX
    ],
)
def test_latents_are_normalised_as_pipelines_do(config, buffers, expected):
    buffers = {name: torch.tensor(values) for name, values in buffers.items()}
    latents = torch.tensor([4.0, 8.0]).view(1, 2, 1, 1)
    found = preview_module._normalised(SimpleNamespace(config=config, _buffers=buffers), latents)
    assert found.flatten().tolist() == expected


def test_a_pipeline_that_shows_no_latents_has_no_previews(load):
    request = GenerateRequest("a cat", width=16, height=16, steps=2, extra={"use_resolution_binning": False})
    pipeline = load("pixart")
    preview = Preview(pipeline, request, lambda latents: pytest.fail("there are none"), budget=NoLimit())
    seen = []
    generate(pipeline, request, lambda step: seen.append((step.latents, preview(step))))
    assert seen == [(None, None)] * 2


PIPELINES = [diffusers.FluxPipeline, diffusers.QwenImagePipeline]


@pytest.mark.parametrize("cls", PIPELINES)
def test_packed_latents_are_laid_out_as_their_pipeline_packed_them(cls):
    latents = noise(2, 16, 6, 10)
    packed = cls._pack_latents(latents, 2, 16, 6, 10)
    assert torch.equal(first_frame(packed, 16, (3, 5)), latents[0])


def test_latents_packed_without_patches_are_laid_out_and_of_a_video_its_first_frame():
    latents = noise(1, 128, 3, 4, 6)
    packed = diffusers.LTXPipeline._pack_latents(latents)
    assert torch.equal(first_frame(packed, 128, (4, 6)), latents[0, :, 0])
    still = diffusers.Flux2Pipeline._pack_latents(latents[:, :, 1])
    assert torch.equal(first_frame(still, 128, (4, 6)), latents[0, :, 1])


def test_latents_of_frames_are_their_first_in_either_order():
    latents = noise(2, 4, 3, 8, 6)
    assert torch.equal(first_frame(latents, 4), latents[0, :, 0])
    assert torch.equal(first_frame(latents.transpose(1, 2), 4), latents[0, :, 0])
    assert torch.equal(first_frame(latents[:, :, 0], 4), latents[0, :, 0])


@pytest.mark.parametrize("shape", [(1, 12, 7), (1, 12, 64), (1, 3, 8, 8), (4,)])
def test_latents_that_are_no_picture_are_an_error(shape):
    with pytest.raises((ValueError, IndexError)):
        first_frame(torch.zeros(shape), 4, None)


@pytest.mark.parametrize(
    ("tokens", "width", "size", "found"),
    [
        (64, 64, (128, 128), (8, 8)),
        (96, 64, (128, 192), (8, 12)),
        (96, 64, (135, 199), (8, 12)),  # rounded down, as pipelines do
        (5 * 96, 64, (128, 192), (8, 12)),  # five frames, or layers
        (384, 16, (128, 192), (16, 24)),  # without patches
        (64, 64, (None, None), (8, 8)),
        (96, 64, (None, None), None),
        (97, 64, (128, 192), None),
    ],
)
def test_the_grid_of_tokens_follows_from_the_size_that_was_asked_for(tokens, width, size, found):
    vae = SimpleNamespace(config=SimpleNamespace(latent_channels=16))
    pipeline = SimpleNamespace(pipe=SimpleNamespace(vae=vae, vae_scale_factor=8))
    assert grid(pipeline, tokens, width, dict(zip(("height", "width"), size, strict=True))) == found


def scheduler(name, **settings):
    made = getattr(diffusers, name)(**settings)
    made.set_timesteps(10)
    return made


@pytest.mark.parametrize(
    "made",
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
        ("DPMSolverMultistepScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
    ids=lambda made: made[0],
)
def test_the_finished_latents_are_exact_where_a_scheduler_s_model_knows_them(made):
    """With a model that always points at the same finished latents, each but the first step tells them exactly."""
    made = scheduler(made[0], **made[1])
    finished, start = noise(2, 1, 4, 8, 8)
    flow = "Flow" in type(made).__name__ or made.config.get("use_flow_sigmas")
    timesteps = made.timesteps
    latents = start if flow else made.add_noise(finished, start, timesteps[:1])
    before, errors = None, []
    for done, timestep in enumerate(timesteps, 1):
        latents = made.step(start - finished if flow else start, timestep, latents, return_dict=False)[0]
        told = foresee(made, before, latents, done, len(timesteps))
        errors.append((told - finished).abs().max().item())
        before = latents
    assert max(errors[1:-1]) < 0.02 < errors[0]


def test_where_each_step_has_new_noise_only_the_last_step_counts():
    made = scheduler("EulerAncestralDiscreteScheduler")
    made._step_index = 5
    latents, before = noise(2, 1, 4, 8, 8)
    sigma = made.sigmas[5].item()
    told = foresee(made, before, latents, 5, 10)
    assert torch.allclose(told, latents / (1 + sigma**2))
    assert torch.equal(foresee(made, before, latents, 10, 10), latents)


def test_without_noise_levels_the_latents_are_shown_as_they_are():
    before, latents = noise(2, 1, 4, 8, 8)
    assert foresee(SimpleNamespace(), before, latents, 3, 9) is latents


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_previews_take_no_more_than_their_share_of_the_time():
    clock = Clock()
    budget = Budget(clock=clock)
    drawn = 0
    for _ in range(1000):
        clock.now += 0.1  # a step
        if budget.allows():
            with budget:
                clock.now += 0.03  # 30% of a step
            drawn += 1
        if drawn > 1:
            assert budget.spent <= SHARE * clock.now
    assert 0.9 * SHARE * clock.now < budget.spent and drawn > 50


def test_a_preview_that_is_quick_is_drawn_at_every_step():
    clock = Clock()
    budget = Budget(clock=clock)
    for _ in range(100):
        clock.now += 1.0
        assert budget.allows()
        with budget:
            clock.now += 0.01


def test_there_are_no_more_than_ten_previews_a_second():
    clock = Clock()
    budget = Budget(clock=clock)
    drawn = 0
    for _ in range(1000):
        clock.now += 0.01
        if budget.allows():
            with budget:
                drawn += 1
    assert 90 <= drawn <= 101


def step(done=5, latents=None):
    return Step(done, 10, torch.zeros(1, 16, 8, 8) if latents is None else latents)


def test_a_step_over_the_budget_is_not_drawn_but_its_latents_are_kept(load):
    drawn = []
    preview = Preview(load("demo"), NIGHT, drawn.append, budget=Budget(clock=Clock()))
    preview.budget.spent = 1.0
    shown = step()
    assert preview(shown) is None and not drawn and preview.before is shown.latents


def test_a_preview_that_fails_is_none_and_not_tried_again_but_says_so(load, caplog):
    tried = []

    def draw(latents):
        tried.append(latents)
        raise ValueError("odd latents")

    preview = Preview(load("demo"), NIGHT, draw, budget=NoLimit())
    with caplog.at_level("DEBUG", "quant_core"):
        assert preview(step()) is None and preview(step()) is None
    assert len(tried) == 1 and [record.message for record in caplog.records if "odd latents" in record.message]


class Interrupt(BaseException):
    """As ComfyUI's is."""


@pytest.mark.parametrize("error", [Interrupt, torch.OutOfMemoryError])
def test_an_interrupt_and_a_full_memory_are_not_the_preview_s(load, error, monkeypatch):
    def fail(*_):
        raise error("now")

    pipeline = load("demo")
    with pytest.raises(error):
        Preview(pipeline, NIGHT, fail, budget=NoLimit())(step())
    monkeypatch.setattr(pipeline.pipe.vae, "encode", fail)
    with pytest.raises(error):
        latent_rgb(pipeline)


def test_a_vae_that_cannot_encode_has_no_map(load, monkeypatch, caplog):
    pipeline = load("demo")
    asked = []

    def fail(pictures):
        asked.append(pictures)
        raise AttributeError("there is no encoder")

    monkeypatch.setattr(pipeline.pipe.vae, "encode", fail)
    with caplog.at_level("DEBUG", "quant_core"):
        assert latent_rgb(pipeline) is None and latent_rgb(pipeline) is None
    assert len(asked) == 1 and "there is no encoder" in caplog.text
    pipeline.pipe.vae = None
    assert latent_rgb(pipeline) is None


def test_the_map_is_learned_once_and_the_same_each_time(load, monkeypatch):
    first, second = load("demo"), load("demo")
    learned, calls = preview_module._learn, []
    monkeypatch.setattr(preview_module, "_learn", lambda *given: calls.append(1) or learned(*given))
    maps = [latent_rgb(pipeline) for pipeline in (first, first, second)]
    assert maps[0] is maps[1] and len(calls) == 2
    assert torch.equal(maps[0].weight, maps[2].weight) and torch.equal(maps[0].bias, maps[2].bias)


def test_the_map_does_not_keep_the_vae(load):
    pipeline = load("demo")
    assert isinstance(latent_rgb(pipeline), LatentRGB)
    vae = weakref.ref(pipeline.pipe.vae)
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert vae() is None
    finally:
        gc.enable()


def test_learning_the_map_leaves_the_images_as_they_are(load):
    pipeline = load("sd3")
    request = GenerateRequest("a cat", width=16, height=16, steps=2)
    plain = generate(pipeline, request)
    preview = Preview(pipeline, request, latent_rgb(pipeline), budget=NoLimit())
    assert torch.equal(generate(pipeline, request, preview), plain)
