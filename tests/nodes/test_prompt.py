"""The nodes one after the other, as a graph runs them."""

import asyncio
import gc
import json
import weakref

import comfy.memory_management
import comfy.model_management as mm
import folder_paths
import pytest
import quant_pack
import torch
from quant_pack.nodes import (
    CompareQuant,
    Generate,
    InspectQuant,
    LoadQuantizedPipeline,
    QuantConfig,
    QuantMapping,
    SaveQuantizedPipeline,
)

COMPARED = ("torchao/int8wo", "transformer=gguf/Q4_0")
SMALL = {"prompt": "a lake at noon", "width": 128, "height": 128, "steps": 2, "guidance": -1.0, "seed": 7}


@pytest.fixture
def device(monkeypatch):
    """A device beside the CPU that computes, and counts what is copied to it."""
    from quant_pack.quant_core import lane

    from ..core.simulated_device import DEVICE, Card

    card = Card()
    card.name = DEVICE
    monkeypatch.setattr(lane.Lane, "copy", lambda self, tensor: card.copy(tensor, self.device))
    monkeypatch.setattr(mm, "get_torch_device", lambda: DEVICE)
    monkeypatch.setattr(mm, "free", mm.free)
    return card


def config(backend, scheme, skip_modules="", **options):
    return QuantConfig.execute(backend={"backend": backend, "scheme": scheme, **options}, skip_modules=skip_modules)[0]


def test_the_extension_lists_every_node():
    nodes = asyncio.run(asyncio.run(quant_pack.comfy_entrypoint()).get_node_list())
    ids = [node.define_schema().node_id for node in nodes]
    names = ("QuantConfig", "QuantMapping", "LoadPipeline", "OptimizePipeline", "Generate", "InspectQuant")
    more = ("SavePipeline", "CompareQuant", "Sensitivity", "AutoPlan")
    assert ids == [f"QDiff_{name}" for name in (*names, *more)]


def test_a_prompt_from_config_to_report():
    mapping = QuantMapping.execute(default=config("torchao", "int8wo"), text_encoder_2=config("quanto", "float8"))[0]
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    images = Generate.execute(pipeline, **SMALL)[0]
    assert images.shape == (1, 128, 128, 3) and images.dtype == torch.float32
    assert images.min() >= 0 and images.max() <= 1
    used = ["text_encoder", "text_encoder_2", "transformer", "vae"]
    assert [patcher.model for patcher in mm.loaded] == [pipeline.models[name] for name in used]
    report = InspectQuant.execute(pipeline)
    assert report.ui["text"] == (report[0],) and report.ui["images"]
    found = {component["name"]: component["requested"] for component in json.loads(report[1])["components"]}
    assert found == {
        "text_encoder": "torchao/int8wo",
        "text_encoder_2": "quanto/float8",
        "transformer": "torchao/int8wo",
        "vae": "",
    }


def test_what_must_be_told_of_a_run_is_on_the_node_and_in_the_log(caplog):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    assert Generate.execute(pipeline, **SMALL).ui is None
    with caplog.at_level("WARNING"):
        told = Generate.execute(pipeline, **SMALL | {"prompt": "a (red:1.5) house"})
    (notice,) = pipeline.notices
    assert told.ui.as_dict()["text"] == (notice,) and "'(red:1.5)'" in notice
    assert [record.getMessage() for record in caplog.records if "red" in record.getMessage()] == [
        f"Generate: {notice}"
    ]


def test_an_inspection_has_a_picture_and_the_error_of_each_layer(device):
    mapping = QuantMapping.execute(text="transformer=torchao/int8wo,text_encoder=bitsandbytes_4bit/nf4")[0]
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    used = device.copied, device.used
    table, text, picture = InspectQuant.execute(pipeline).args
    assert (device.copied, device.used) == used, "measuring moves nothing"
    assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    layers = json.loads(text)["layers"]
    errors = {name: [layer["error"] for layer in found if layer["is_quantized"]] for name, found in layers.items()}
    assert len(errors["transformer"]) == 54 and max(errors["transformer"]) < min(errors["text_encoder"])
    plain = InspectQuant.execute(pipeline, theme="light", errors=False)
    assert plain[0] == table and plain[2].mean() > 0.8 > 0.3 > picture.mean()
    assert {layer["error"] for found in json.loads(plain[1])["layers"].values() for layer in found} == {None}
    pipeline.memory.forget()
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before)


def test_cancel_stops_the_measuring_of_errors(monkeypatch):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", QuantMapping.execute(text="torchao/int8wo")[0])[0]
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        InspectQuant.execute(pipeline)
    assert InspectQuant.execute(pipeline)[0]


def test_the_outputs_that_workflows_are_wired_to_stay_where_they_are():
    schema = InspectQuant.define_schema()
    assert [output.id for output in schema.outputs] == ["report", "json", "picture"]
    assert [given.id for given in schema.inputs] == ["pipeline", "after", "theme", "errors"]
    assert all(given.settings["optional"] for given in schema.inputs[1:])


def test_what_is_quantized_is_kept_in_the_model_folder_unless_switched_off(comfyui, monkeypatch):
    mapping = QuantMapping.execute(transformer=config("gguf", "Q4_0"))[0]

    def origin(**settings):
        return LoadQuantizedPipeline.execute("demo", "bfloat16", mapping, **settings)[0].origins["transformer"].kind

    def kept(folder):
        return len(list((comfyui / folder).glob("FluxTransformer2DModel-gguf-Q4_0-*/weights.gguf")))

    assert origin(store=False) == "quantized" and not (comfyui / "quantized_diffusers").exists()
    assert [origin(), origin()] == ["stored", "store"] and kept("quantized_diffusers") == 1
    monkeypatch.setitem(folder_paths.folders, "quantized_diffusers", [str(comfyui / "elsewhere")])
    assert origin() == "stored" and kept("elsewhere") == 1
    monkeypatch.setenv("QUANTIZED_DIFFUSERS_STORE", "off")
    assert origin() == "quantized"
    report = InspectQuant.execute(LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0])[0]
    assert "\ntransformer: gguf/Q4_0 quantized, not stored, " in report


def test_a_pipeline_is_saved_as_it_is_on_the_device_and_then_listed(comfyui, device):
    mapping = QuantMapping.execute(transformer=config("bitsandbytes_4bit", "nf4"), text_encoder=config("gguf", "Q8_0"))
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping[0])[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    assert pipeline.patchers["transformer"].loaded_size() > 0
    saved = SaveQuantizedPipeline.execute(pipeline, "demo nf4")
    assert saved[0] == str(comfyui / "diffusers" / "demo nf4")
    assert "transformer: bitsandbytes_4bit/nf4, " in saved.ui.value and "because of text_encoder" in saved.ui.value
    assert LoadQuantizedPipeline.validate_inputs("demo nf4") is True
    again = LoadQuantizedPipeline.execute("demo nf4", "bfloat16")[0]
    assert torch.equal(Generate.execute(again, **SMALL)[0], before)
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before)
    with pytest.raises(ValueError, match="is there already"):
        SaveQuantizedPipeline.execute(pipeline, "demo nf4")


def test_mappings_are_compared_on_the_device_one_pipeline_at_a_time(device, monkeypatch):
    mappings = {f"mapping_{number}": QuantMapping.execute(text=text)[0] for number, text in enumerate(COMPARED, 1)}
    settings = {"width": 64, "height": 64, "steps": 2, "guidance": -1.0, "seed": 3, "pictures": 2}
    found = CompareQuant.execute("demo", "bfloat16", "a lake\n\nhills", **settings, **mappings)
    grid, differences, chart, table, text, csv = found.args
    for picture in (grid, differences, chart):
        assert picture.ndim == 4 and picture.shape[0] == 1 and picture.shape[3] == 3 and picture.dtype == torch.float32
    data = json.loads(text)
    assert [plan["label"] for plan in data["plans"]] == ["16 bit", *COMPARED] and data["prompts"] == [
        "a lake",
        "hills",
    ]
    assert data["plans"][0]["equal"] and not data["plans"][1]["equal"] and data["seeds"] == [3, 4]
    assert found.ui.value == table and all(label in table for label in COMPARED) and csv.count("\n") == 13
    assert device.copied > 0
    gc.collect()
    assert device.used == 0, "no pipeline is left on the device"
    with pytest.raises(ValueError, match="No mapping is wired"):
        CompareQuant.execute("demo", "bfloat16", "a lake", **settings)
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        CompareQuant.execute("demo", "bfloat16", "a lake", **settings, **mappings)


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/tmp/x", "a\\b", ".hidden", "ends.", " ", "nul\0"])
def test_a_pipeline_is_saved_under_a_plain_name_only(comfyui, name):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    with pytest.raises(ValueError, match="it takes the name of a new folder"):
        SaveQuantizedPipeline.execute(pipeline, name)
    assert not list((comfyui / "diffusers").iterdir())


def test_cancel_stops_a_save_and_leaves_nothing(comfyui, monkeypatch):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        SaveQuantizedPipeline.execute(pipeline, "demo saved")
    assert not list((comfyui / "diffusers").iterdir())


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
def test_a_pipeline_survives_being_evicted_and_loaded_again(backend, device):
    mapping = QuantMapping.execute(text=backend)[0]
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", mapping)[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    for name, patcher in pipeline.patchers.items():
        assert patcher.loaded_size() == patcher.model_size() == pipeline.placements[name].size > 0
        assert patcher.current_loaded_device() == device.name
        assert patcher.detach() is pipeline.models[name]
        assert patcher.loaded_size() == 0 and patcher.current_loaded_device() == mm.unet_offload_device()
    assert device.used == 0
    pipeline.memory.forget()
    copied = device.copied
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before)
    assert device.copied > copied and device.used == sum(map(type(patcher).loaded_size, pipeline.patchers.values()))


def test_a_resident_component_that_is_asked_for_again_stays_where_it_is(device):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    patcher = pipeline.patchers["transformer"]
    for extra in (1e32, 0):
        mm.load_models_gpu([patcher])
        copied, before = device.copied, [id(weight) for weight in patcher.model.parameters()]
        assert patcher.detach(unpatch_all=False) is patcher.model
        assert patcher.partially_load(patcher.load_device, extra) == 0
        assert device.copied == copied and [id(weight) for weight in patcher.model.parameters()] == before


def test_a_part_of_a_component_can_come_and_go(device):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16", QuantMapping.execute(text="torchao/int8wo")[0])[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    patcher = pipeline.patchers["transformer"]
    size, part = patcher.model_size(), patcher.model_size() // 5
    assert patcher.loaded_size() == size
    freed = patcher.partially_unload(patcher.offload_device, part)
    assert part <= freed < size and patcher.loaded_size() == size - freed == size_of(device, pipeline, patcher)
    given = patcher.partially_load(patcher.load_device, -part)
    assert -given >= part and patcher.loaded_size() == size - freed + given == size_of(device, pipeline, patcher)
    assert patcher.partially_load(patcher.load_device, 0) == 0
    back = patcher.partially_load(patcher.load_device, freed / 2)
    assert 0 <= back <= freed / 2 and patcher.loaded_size() == size - freed + given + back
    mm.free = 0  # what is beyond stays where it is, and is streamed
    other = Generate.execute(pipeline, **SMALL | {"prompt": "a red house"})[0]
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before) and not torch.equal(other, before)
    assert patcher.loaded_size() == size - freed + given + back == size_of(device, pipeline, patcher)


def size_of(device, pipeline, patcher):
    """What of a component is on the device, by what is counted there."""
    return device.used - sum(other.loaded_size() for other in pipeline.patchers.values() if other is not patcher)


def test_a_load_that_runs_out_of_memory_gives_all_back(device):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    before = Generate.execute(pipeline, **SMALL)[0]
    patcher = pipeline.patchers["transformer"]
    others = device.used - patcher.loaded_size()
    for count in (1, 20, 60):
        patcher.detach()
        device.failing = [device.copied + count, torch.OutOfMemoryError("full")]
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            patcher.partially_load(patcher.load_device, 1e32)
        assert patcher.loaded_size() == 0 and device.used == others
    assert torch.equal(Generate.execute(pipeline, **SMALL)[0], before)


def test_what_the_cache_keeps_of_earlier_prompts_goes_before_the_next_pipeline_comes(monkeypatch):
    from quant_pack.quant_core import reading

    read, events = reading.read_weights, []
    monkeypatch.setattr(comfy.memory_management, "extra_ram_release", lambda size: events.append(size))
    monkeypatch.setattr(reading, "read_weights", lambda *given: events.append("read") or read(*given))
    LoadQuantizedPipeline.execute("demo", "bfloat16")
    assert events[0] >= 2**50 and events[1:] == ["read"] * 4
    events.clear()
    with pytest.raises(ValueError):
        LoadQuantizedPipeline.execute("no such folder", "bfloat16")
    assert events == [], "what is not going to load drops nothing"
    monkeypatch.delattr(comfy.memory_management, "extra_ram_release")  # as before ComfyUI 0.19
    assert LoadQuantizedPipeline.execute("demo", "bfloat16")[0].models


def test_cancel_stops_at_the_next_step_and_leaves_the_pipeline_usable(monkeypatch):
    pipeline = LoadQuantizedPipeline.execute("demo", "bfloat16")[0]
    with monkeypatch.context() as cancelled, pytest.raises(mm.InterruptProcessingException):
        cancelled.setattr(mm, "interrupted", True)
        Generate.execute(pipeline, **SMALL)
    assert Generate.execute(pipeline, **SMALL)[0].shape == (1, 128, 128, 3)


def test_cancel_stops_a_load_between_components_and_frees_what_was_loaded(monkeypatch):
    from quant_pack.quant_core import reading

    read, modules = reading.read_weights, []

    def read_and_cancel(*arguments):
        module = read(*arguments)
        modules.append(weakref.ref(module))
        monkeypatch.setattr(mm, "interrupted", True)
        return module

    monkeypatch.setattr(reading, "read_weights", read_and_cancel)
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
