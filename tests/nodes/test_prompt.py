"""The nodes one after the other, as a graph runs them."""

import asyncio
import gc
import json
import weakref

import comfy.model_management as mm
import pytest
import quant_pack
import torch
from quant_pack.nodes import Generate, InspectQuant, LoadQuantizedPipeline, QuantConfig, QuantMapping

SMALL = {"prompt": "a lake at noon", "width": 128, "height": 128, "steps": 2, "guidance": -1.0, "seed": 7}


def config(backend, scheme, skip_modules="", **options):
    return QuantConfig.execute(backend={"backend": backend, "scheme": scheme, **options}, skip_modules=skip_modules)[0]


def test_the_extension_lists_every_node():
    nodes = asyncio.run(asyncio.run(quant_pack.comfy_entrypoint()).get_node_list())
    ids = [node.define_schema().node_id for node in nodes]
    assert ids == [
        f"QDiff_{name}" for name in ("QuantConfig", "QuantMapping", "LoadPipeline", "Generate", "InspectQuant")
    ]


def test_a_prompt_from_config_to_report():
    mapping = QuantMapping.execute(default=config("torchao", "int8wo"), text_encoder_2=config("quanto", "float8"))[0]
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    images = Generate.execute(pipeline, **SMALL)[0]
    assert images.shape == (1, 128, 128, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    used = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert [patcher.model for patcher in mm.loaded] == [pipeline.models[name] for name in used]
    report = InspectQuant.execute(pipeline)
    assert report.ui.value == report[0]
    found = {component["name"]: component["requested"] for component in json.loads(report[1])["components"]}
    assert found == {
        "text_encoder": "torchao/int8wo",
        "text_encoder_2": "quanto/float8",
        "transformer": "torchao/int8wo",
        "vae": "",
    }


def test_a_made_gguf_file_is_kept_in_the_model_folder(comfyui):
    mapping = QuantMapping.execute(transformer=config("gguf", "Q4_0"))[0]
    LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)
    assert [path.name.startswith("transformer-Q4_0-") for path in comfyui.glob("quantized_diffusers/**/*.gguf")] == [
        True
    ]


@pytest.mark.parametrize(
    "backend",
    [
        "torchao/int8wo",
        "torchao/nvfp4wo",
        "bitsandbytes_4bit/nf4",
        "bitsandbytes_8bit/int8",
        "quanto/int8",
        "quanto/int4",
        "gguf/Q8_0",
    ],
)
def test_a_pipeline_survives_being_evicted_and_loaded_again(backend):
    mapping = QuantMapping.execute(text=backend)[0]
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    for patcher in pipeline.patchers.values():
        patcher.detach()
        assert patcher.loaded_size() == 0
        with torch.inference_mode(False):  # new tensors, as a move between devices makes them
            patcher.model._apply(lambda tensor: tensor.clone())
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before)


def test_cancel_stops_at_the_next_step_and_leaves_the_pipeline_usable(monkeypatch):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        Generate.execute(pipeline, **SMALL)
    assert Generate.execute(pipeline, **SMALL)[0].shape == (1, 128, 128, 3)


def test_cancel_stops_a_load_between_components_and_frees_what_was_loaded(monkeypatch):
    from quant_pack.quant_core import loading

    read, modules = loading.read_weights, []

    def read_and_cancel(*arguments):
        module = read(*arguments)
        modules.append(weakref.ref(module))
        monkeypatch.setattr(mm, "interrupted", True)
        return module

    monkeypatch.setattr(loading, "read_weights", read_and_cancel)
    with pytest.raises(mm.InterruptProcessingException):
        LoadQuantizedPipeline.execute("demo", "bfloat16")
    gc.collect()
    assert [module() for module in modules] == [None]


def test_an_output_that_comfyui_drops_is_freed_at_once(request):
    pipeline = LoadQuantizedPipeline.execute(
        "demo", "bfloat16", QuantMapping.execute(text="bitsandbytes_4bit/nf4")[0]
    )[0]
    Generate.execute(pipeline, **SMALL)
    mm.loaded.clear()
    assert pipeline.patcher.model_size() == max(patcher.model_size() for patcher in pipeline.patchers.values())
    transformer = weakref.ref(pipeline.models["transformer"])
    gc.disable()
    request.addfinalizer(gc.enable)
    del pipeline
    assert transformer() is None
