"""What ComfyUI is shown of a run and of a load: steps, text, previews as the user has set them; cancelling."""

import gc
import logging
import time
import weakref
from types import SimpleNamespace

import comfy.cli_args
import comfy.model_management as mm
import comfy.utils
import comfy_execution.utils
import latent_preview
import pytest
import server
import torch
from comfy.cli_args import LatentPreviewMethod
from diffusers import AutoencoderKL, AutoencoderKLWan, FluxPipeline
from PIL import Image
from quant_pack.nodes import Generate, LoadQuantizedPipeline, comfy_progress
from quant_pack.quant_core import GenerateRequest, Step

REQUEST = GenerateRequest("a lake at noon", width=128, height=128, steps=3, seed=7)
SMALL = {"prompt": "a lake at noon", "width": 128, "height": 128, "steps": 3, "guidance": -1.0, "seed": 7}


@pytest.fixture
def previews(monkeypatch):
    """Set the preview method; what was drawn by ComfyUI's own previewer."""
    monkeypatch.setattr(latent_preview, "drawn", [])

    def choose(method):
        monkeypatch.setattr(comfy.cli_args.args, "preview_method", LatentPreviewMethod(method))
        return latent_preview.drawn

    return choose


@pytest.fixture
def shown(monkeypatch):
    """What the progress bar was given: (value, total, preview)."""
    monkeypatch.setattr(comfy.utils, "shown", [])
    return comfy.utils.shown


@pytest.fixture
def texts(monkeypatch):
    """(text, node, client) that were sent to the browser."""
    sent = []
    instance = SimpleNamespace(client_id="me", send_progress_text=lambda *message: sent.append(message))
    monkeypatch.setattr(server.PromptServer, "instance", instance, raising=False)
    monkeypatch.setattr(comfy_execution.utils, "context", SimpleNamespace(node_id="12"))
    return sent


@pytest.fixture
def pipeline():
    return LoadQuantizedPipeline.execute("demo", "bfloat16")[0]


def test_the_node_tells_its_pace_and_at_the_end_the_whole_run(texts, pipeline, caplog, monkeypatch):
    monkeypatch.setattr(comfy_progress, "_TEXT_INTERVAL", 0)
    texts.clear()
    with caplog.at_level(logging.INFO):
        Generate.execute(pipeline, **SMALL)
    assert [text.split(",")[0] for text, _, _ in texts[:2]] == ["1/3", "2/3"]
    assert texts[1][0].endswith(" left") and ("steps/s" in texts[1][0] or "s/step" in texts[1][0])
    assert texts[2][0].startswith("3 steps in ") and len(texts) == 3
    assert {message[1:] for message in texts} == {("12", "me")}
    lines = [record.message for record in caplog.records if " steps in " in record.message]
    assert lines == [f"FluxPipeline (16 bit): {texts[2][0]}"]


def test_text_is_sent_twice_a_second_at_most_but_for_the_last(texts, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    text = comfy_progress._NodeText()
    for number in range(20):
        text.show(str(number))
        now[0] += 0.125
    text.show("last", now=True)
    assert [message[0] for message in texts] == ["0", "4", "8", "12", "16", "last"]


def test_without_a_server_or_a_running_node_no_text_is_sent(texts, monkeypatch):
    monkeypatch.setattr(comfy_execution.utils, "context", None)
    comfy_progress._NodeText().show("lost", now=True)
    monkeypatch.undo()
    comfy_progress._NodeText().show("lost", now=True)
    assert texts == []


def test_without_previews_nothing_is_computed(previews, shown, pipeline, monkeypatch):
    previews("none")
    for name in ("latent_rgb", "Preview", "_format", "_picture"):
        monkeypatch.setattr(comfy_progress, name, lambda *_, **__: pytest.fail("a preview was computed"))
    Generate.execute(pipeline, **SMALL)
    assert shown[-3:] == [(1, 3, None), (2, 3, None), (3, 3, None)]


def test_a_pipeline_that_comfyui_does_not_know_has_learned_previews(previews, shown, pipeline, monkeypatch):
    drawn = previews("auto")
    monkeypatch.setattr("quant_pack.quant_core.preview.SHARE", 1.0)
    monkeypatch.setattr("quant_pack.quant_core.preview.Budget.allows", lambda budget: True)
    Generate.execute(pipeline, **SMALL)
    assert drawn == []
    for _, total, (kind, picture, most) in shown[-3:]:
        assert total == 3 and kind == "JPEG" and most == 256
        assert isinstance(picture, Image.Image) and picture.mode == "RGB" and picture.size == (256, 256)
    assert [value for value, _, _ in shown[-3:]] == [1, 2, 3]
    assert shown[-1][2][1].tobytes() != shown[-2][2][1].tobytes()


def test_a_pipeline_that_had_previews_is_freed_at_once(previews, request):
    previews("auto")
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    Generate.execute(pipeline, **SMALL)
    mm.loaded.clear()
    modules = [weakref.ref(module) for module in pipeline.models.values()]
    gc.collect()
    gc.disable()
    request.addfinalizer(gc.enable)
    del pipeline
    assert [module() for module in modules] == [None] * len(modules)


def with_vae(vae, **pipe):
    """As much of a pipeline as previews look at."""
    pipe = {"vae": vae, "scheduler": None, "__class__": FluxPipeline, **pipe}
    return SimpleNamespace(pipe=type("Pipe", (), {**pipe, "__call__": FluxPipeline.__call__})())


def image_vae(channels, scaling, shift=None):
    return AutoencoderKL(
        block_out_channels=[8],
        norm_num_groups=4,
        latent_channels=channels,
        scaling_factor=scaling,
        shift_factor=shift,
    )


def test_the_latents_of_flux_reach_comfyui_s_previewer_as_its_sampler_would_hand_them(previews):
    drawn = previews("auto")
    pipeline = with_vae(image_vae(16, 0.3611, 0.1159), vae_scale_factor=8)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    packed = FluxPipeline._pack_latents(latents, 1, 16, 16, 16)
    kind, picture, most = comfy_progress._preview(pipeline, REQUEST)(Step(3, 3, packed))
    ((name, handed),) = drawn
    assert name == "Flux" and torch.equal(handed, latents)
    assert (kind, picture.size, most) == ("JPEG", (16, 16), latent_preview.MAX_PREVIEW_RESOLUTION)


def test_the_latents_of_a_video_reach_comfyui_s_previewer_as_one_frame(previews):
    drawn = previews("auto")
    pipeline = with_vae(AutoencoderKLWan(base_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[]))
    latents = torch.arange(1.0 * 16 * 5 * 4 * 6).view(1, 16, 5, 4, 6)
    comfy_progress._preview(pipeline, REQUEST)(Step(3, 3, latents))
    ((name, handed),) = drawn
    assert name == "Wan21" and torch.equal(handed, latents[:, :, :1])


@pytest.mark.parametrize(
    ("vae", "name"),
    [
        ((4, 0.18215), "SD15"),
        ((16, 0.3611), "Flux"),
        ((16, 0.6196643329244397), None),  # the demo's own
        ((4, 0.3611), None),
        ((16, 1.5305), None),  # SD3, which this ComfyUI lacks
    ],
)
def test_comfyui_s_formats_are_known_by_channels_and_scale(vae, name):
    found = comfy_progress._format(image_vae(*vae))
    assert (type(found).__name__ if found else None) == name


def test_a_previewer_that_comfyui_has_not_is_no_preview(previews, monkeypatch):
    previews("auto")
    monkeypatch.setattr(latent_preview, "get_previewer", lambda device, known: None)
    assert comfy_progress._preview(with_vae(image_vae(4, 0.18215)), REQUEST) is None


def test_a_load_is_shown_layer_by_layer_and_can_be_cancelled_within_a_component(texts, shown, monkeypatch):
    from quant_pack.nodes import QuantMapping

    mapping = QuantMapping.execute(text="torchao/int8wo")[0]
    LoadQuantizedPipeline.execute("demo", "bfloat16", mapping, store=False)
    assert len(shown) > 50 and shown[-1][0] == shown[-1][1] > 10**7
    assert texts[0][0].startswith("0.0 of 26.") and texts[-1][0] == "{0} of {0} MB".format(texts[-1][0].split()[0])

    def cancel_at_the_tenth(self, value, total=None, preview=None):
        shown.append((value, total, preview))
        mm.interrupted = len(shown) == 10

    shown.clear()
    monkeypatch.setattr(mm, "interrupted", False)
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", cancel_at_the_tenth)
    with pytest.raises(mm.InterruptProcessingException):
        LoadQuantizedPipeline.execute("demo", "bfloat16", mapping, store=False)
    assert len(shown) == 10


def test_the_check_between_blocks_raises_comfyui_s_interrupt(monkeypatch):
    assert comfy_progress.stop_if_cancelled() is None
    monkeypatch.setattr(mm, "interrupted", True)
    with pytest.raises(mm.InterruptProcessingException):
        comfy_progress.stop_if_cancelled()
