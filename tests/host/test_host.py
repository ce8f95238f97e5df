"""The example workflows and their failures in a real ComfyUI on the CPU: pytest -m host"""

import copy
import json

import pytest
from PIL import Image

from .conftest import COMFYUI, PYTHON, ROOT, error_of, start

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (COMFYUI / "main.py").is_file() or not PYTHON.exists(), reason="no ComfyUI"),
]

WORKFLOWS = sorted((ROOT / "example_workflows/api").glob("*.json"))


def load(name):
    return json.loads((ROOT / "example_workflows/api" / f"{name}.json").read_text())


def node(prompt, class_type):
    return next(key for key, value in prompt.items() if value["class_type"] == class_type)


def changed(prompt, class_type, **inputs):
    prompt = copy.deepcopy(prompt)
    prompt[node(prompt, class_type)]["inputs"].update(inputs)
    return prompt


def cached(done):
    return set(dict(done["status"]["messages"])["execution_cached"]["nodes"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_example_workflow_runs_as_it_is(host, path):
    prompt = json.loads(path.read_text())
    done = host.run(prompt)
    assert done["status"]["status_str"] == "success", error_of(done)
    assert done["outputs"][node(prompt, "SaveImage")]["images"]
    kinds = {value["class_type"] for value in prompt.values()}
    teller, *words = (
        ("QDiff_CompareQuant", "PSNR", "16 bit")
        if "QDiff_CompareQuant" in kinds
        else ("QDiff_InspectQuant", "transformer", "total")
    )
    told = done["outputs"][node(prompt, teller)]
    assert all(word in told["text"][0] for word in words)
    if teller == "QDiff_InspectQuant":
        (picture,) = told["images"]
        file = host.base / "temp" / picture["subfolder"] / picture["filename"]
        assert picture["type"] == "temp" and Image.open(file).width > 1000


def test_a_new_seed_runs_only_generate(host):
    prompt = load("demo_default")
    host.run(changed(prompt, "QDiff_Generate", seed=100))
    done = host.run(changed(prompt, "QDiff_Generate", seed=101))
    ran = prompt.keys() - cached(done)
    assert ran == {node(prompt, "QDiff_Generate"), node(prompt, "SaveImage")}


@pytest.mark.parametrize("workflow", ["demo_default", "demo_optimize"])
def test_cancelling_stops_within_a_step_and_the_next_prompt_works(host, workflow):
    steps = 400  # ComfyUI reports progress at most every half percent
    prompt = load(workflow)
    host.run(prompt)  # so that the pipeline is loaded
    events = host.events("cancel")
    next(events)
    answer = host.post(changed(prompt, "QDiff_Generate", steps=steps, seed=7), client_id="cancel")
    asked = last = 0
    for kind, data in events:
        if kind == "progress" and data["max"] == steps:
            last = data["value"]
            if not asked:
                asked = last
                host.get("/interrupt", {})
        if kind == "execution_interrupted":
            assert data["node_id"] == node(prompt, "QDiff_Generate")
            break
    assert 0 < asked <= last <= asked + 8  # as many as may pass until the request has arrived
    assert host.wait(answer["prompt_id"])["status"]["completed"] is False
    done = host.run(changed(prompt, "QDiff_Generate", seed=8))
    assert done["status"]["status_str"] == "success"


def test_a_compiled_pipeline_is_compiled_once(host):
    prompt = load("demo_optimize")
    told = []
    for seed in (20, 21):
        done = host.run(changed(prompt, "QDiff_Generate", seed=seed))
        assert done["status"]["status_str"] == "success", error_of(done)
        told.append(done["outputs"][node(prompt, "QDiff_InspectQuant")]["text"][0])
    assert "compile blocks: 0 graphs, 0 of them new" in told[1]
    assert all("of 24 passes reused" in text for text in told)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"offload": "group", "offload.stream": True}, "offload group streams only to a GPU"),
        ({"cache": "taylor"}, "cache taylor acts inside of the blocks that are compiled"),
        ({"compile": "blocks", "compile.depth": 2}, "Optimize Pipeline has no input 'compile.depth'"),
        ({"attention": "sage_hub"}, "attention sage_hub would download a kernel"),
    ],
)
def test_what_cannot_be_optimized_gets_our_sentence(host, inputs, sentence):
    prompt = load("demo_optimize")
    given = prompt[node(prompt, "QDiff_OptimizePipeline")]["inputs"]
    replaced = {name.partition(".")[0] for name in inputs}
    for name in [name for name in given if name.partition(".")[0] in replaced]:
        del given[name]
    assert sentence in error_of(host.run(changed(prompt, "QDiff_OptimizePipeline", **inputs)))


def test_an_unknown_backend_gets_our_sentence(host):
    prompt = changed(load("demo_default"), "QDiff_QuantConfig", backend="bitsnbytes")
    assert error_of(host.run(prompt)).startswith("Unknown backend 'bitsnbytes'")


@pytest.mark.parametrize(
    ("kind", "inputs", "sentence"),
    [
        ("QDiff_QuantConfig", {"backend": "bnb"}, "Unknown backend 'bnb'"),
        ("QDiff_QuantConfig", {"backend.scheme": "int9wo"}, "torchao has no scheme 'int9wo'; use one of: "),
        ("QDiff_QuantConfig", {"group_size": "32"}, "no input 'group_size' (did you mean 'backend.group_size'?)"),
        ("QDiff_QuantConfig", {"backend.double_quant": True}, "no input 'backend.double_quant'; it takes: backend, "),
        ("QDiff_Generate", {"negative_promt": "rain"}, "no input 'negative_promt' (did you mean 'negative_prompt'?)"),
        ("QDiff_LoadPipeline", {"varient": "fp16"}, "Load Quantized Pipeline has no input 'varient' (did you mean"),
        ("QDiff_LoadPipeline", {"mappping": ["2", 0]}, "no input 'mappping' (did you mean 'mapping'?)"),
        ("QDiff_LoadPipeline", {"mapping": "x"}, "mapping is 'x'; it takes a wire from Quantization Mapping or"),
        ("QDiff_Generate", {"pipeline": "x"}, "pipeline is 'x'; it takes a wire from Load Quantized Pipeline or"),
        ("QDiff_InspectQuant", {"pipeline": {}}, "pipeline is {}; it takes a wire from Load Quantized Pipeline or"),
        ("QDiff_QuantMapping", {"base": 3}, "base is 3; it takes a wire from Quantization Mapping or Automatic"),
    ],
)
def test_what_comfyui_would_drop_or_let_pass_gets_our_sentence(host, kind, inputs, sentence):
    done = host.run(changed(load("demo_default"), kind, **inputs))
    assert sentence in error_of(done)
    assert dict(done["status"]["messages"])["execution_error"]["exception_type"] == "quantized_diffusers.SpecError"


@pytest.mark.parametrize("value", [[], {}, 3])
def test_a_pipeline_that_is_no_name_is_refused_without_a_raw_error(host, value):
    prompt = changed(load("demo_default"), "QDiff_LoadPipeline", pipeline=value)
    errors = host.post(prompt)["node_errors"][node(prompt, "QDiff_LoadPipeline")]["errors"]
    assert f"There is no diffusers pipeline {value!r} under models/diffusers" in errors[-1]["details"]
    assert not [error for error in errors if "unhashable" in str(error)]


@pytest.mark.parametrize("budget", ["15MiB", 0.0146, ["9", 0]])
def test_a_budget_comes_as_text_as_the_number_it_was_and_over_a_wire(host, budget):
    prompt = load("demo_auto_plan")
    number = {"class_type": "PrimitiveFloat", "inputs": {"value": 0.0146}}
    inputs = prompt[node(prompt, "QDiff_AutoPlan")]["inputs"] | {"budget": budget}
    done = host.run({"1": {"class_type": "QDiff_AutoPlan", "inputs": inputs}, "9": number})
    assert done["status"]["status_str"] == "success", error_of(done)
    told = done["outputs"]["1"]["text"][0]
    assert " of 15.00 MiB of weights" in told or " of 14.95 MiB of weights" in told


def test_a_missing_component_gets_our_sentence(host):
    prompt = load("demo_default")
    config = prompt[node(prompt, "QDiff_QuantMapping")]["inputs"].pop("default")
    prompt = changed(prompt, "QDiff_QuantMapping", unet=config)
    assert error_of(host.run(prompt)).startswith("No component 'unet' in this FluxPipeline")


@pytest.mark.parametrize("name", ["../landscapes", "/etc", "landscapes/../landscapes", "absent"])
def test_a_folder_that_is_not_listed_gets_our_sentence(host, name):
    prompt = changed(load("demo_default"), "QDiff_LoadPipeline", pipeline=name)
    answer = host.post(prompt)
    errors = answer["node_errors"][node(prompt, "QDiff_LoadPipeline")]["errors"]
    assert f"There is no diffusers pipeline {name!r} under models/diffusers" in errors[0]["details"]


def test_a_pipeline_of_models_diffusers_gives_the_picture_of_the_bundled_one(host):
    prompts = [changed(load("demo_default"), "QDiff_LoadPipeline", pipeline=name) for name in ("demo", "landscapes")]
    pictures = []
    for prompt in prompts:
        image = host.run(prompt)["outputs"][node(prompt, "SaveImage")]["images"][0]
        file = host.base / "output" / image["subfolder"] / image["filename"]
        pictures.append(Image.open(file).tobytes())
    assert pictures[0] == pictures[1]


HIDE = """
import sys
from importlib import metadata

VERSION = metadata.version
VERSIONS = {versions!r}

def version(name):
    if VERSIONS.get(name, "") is None:
        raise metadata.PackageNotFoundError(name)
    return VERSIONS.get(name) or VERSION(name)

metadata.version = version
sys.modules |= {{name: None for name, version in VERSIONS.items() if version is None}}
"""


@pytest.mark.parametrize(
    ("versions", "named"),
    [({"diffusers": None}, "diffusers>=0.42"), ({"diffusers": "0.30.0"}, "diffusers>=0.42 (0.30.0 is there)")],
)
def test_forgotten_requirements_are_told_at_the_start_and_by_the_node(tmp_path, versions, named):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes/pack").symlink_to(ROOT)
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(versions=versions))
    host, process = start(tmp_path, PYTHONPATH=str(tmp_path))
    try:
        (line,) = [line for line in host.log.splitlines() if "requirements are not installed" in line]
        assert "WARNING" in line and f"Quantized Diffusers: The pack's requirements are not installed: {named}" in line
        assert f'"{PYTHON}" -m pip install -r "' in line and line.endswith('requirements.txt"')
        assert len([name for name in host.get("/object_info") if name.startswith("QDiff_")]) == 10
        assert error_of(host.run(load("demo_default"))) in line
    finally:
        process.terminate()
        process.wait(30)


def test_the_second_start_of_a_server_loads_from_the_store(tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes/pack").symlink_to(ROOT)
    told, pictures = [], []
    for _ in range(2):
        host, process = start(tmp_path)
        try:
            prompt = load("demo_default")
            done = host.run(prompt)
            image = done["outputs"][node(prompt, "SaveImage")]["images"][0]
            pictures.append(Image.open(tmp_path / "output" / image["subfolder"] / image["filename"]).tobytes())
            told.append(host.log)
        finally:
            process.terminate()
            process.wait(30)
    assert "quantized and stored" in told[0] and "from the store" not in told[0]
    assert "from the store" in told[1] and "quantized and stored" not in told[1]
    assert pictures[0] == pictures[1]
    assert list((tmp_path / "models/quantized_diffusers").glob("*/manifest.json"))


def test_a_pipeline_that_was_saved_is_listed_and_gives_the_same_picture(host):
    prompt = load("demo_default")
    first = host.run(prompt)
    save = {"pipeline": [node(prompt, "QDiff_LoadPipeline"), 0], "name": "saved-int8"}
    done = host.run({**prompt, "900": {"class_type": "QDiff_SavePipeline", "inputs": save}})
    assert done["status"]["status_str"] == "success", error_of(done)
    told = done["outputs"]["900"]["text"][0]
    assert "plain diffusers opens it, too" in told
    assert (
        "saved-int8" in host.get("/object_info")["QDiff_LoadPipeline"]["input"]["required"]["pipeline"][1]["options"]
    )
    plain = changed(prompt, "QDiff_LoadPipeline", pipeline="saved-int8")
    del plain[node(prompt, "QDiff_LoadPipeline")]["inputs"]["mapping"]
    second = host.run(plain)
    assert second["status"]["status_str"] == "success", error_of(second)
    pictures = []
    for answer in (first, second):
        image = answer["outputs"][node(prompt, "SaveImage")]["images"][0]
        pictures.append(Image.open(host.base / "output" / image["subfolder"] / image["filename"]).tobytes())
    assert pictures[0] == pictures[1]
    again = host.run({**plain, "900": {"class_type": "QDiff_SavePipeline", "inputs": save | {"name": "../x"}}})
    assert "it takes the name of a new folder" in error_of(again)


def test_every_node_has_tooltips_and_a_help_page(host):
    info = host.get("/object_info")
    ours = {name: node for name, node in info.items() if name.startswith("QDiff_")}
    assert len(ours) == 10
    for name, node_info in ours.items():
        for kind in ("required", "optional"):
            assert all(spec[1].get("tooltip") for spec in node_info["input"].get(kind, {}).values()), name
        assert node_info["search_aliases"], name
        help_page = (ROOT / "web/docs" / f"{name}.md").read_text()
        inputs = {key for kind in ("required", "optional") for key in node_info["input"].get(kind, {})}
        assert not [key for key in inputs if key not in help_page], name


def test_the_pack_is_listed_with_its_templates(host):
    templates = host.get("/workflow_templates")
    assert set(templates["Any Name v1.0"]) == {path.stem for path in WORKFLOWS}
