"""Every scheme on a CUDA device, where there is one."""

import pytest
import torch

from quant_core import (
    DeviceUnsupported,
    GenerateRequest,
    LoadRequest,
    Placement,
    QuantPlan,
    QuantSpec,
    SpecError,
    backends,
    generate,
    load_pipeline,
    manage,
    missing,
    optimize,
    parse_optimization,
    parse_plan,
)
from quant_core.backend import Recipe

from ..core.layouts import IN, OUT, layouts, off

pytestmark = pytest.mark.gpu

SMALL = GenerateRequest("a lake at noon", width=128, height=128, steps=2, seed=3, max_sequence_length=48)
SCHEMES = [(name, scheme) for name, backend in backends().items() for scheme in backend.schemes if scheme.bits]


@pytest.mark.parametrize(("name", "scheme"), SCHEMES, ids=lambda item: getattr(item, "name", item))
def test_a_scheme_quantizes_runs_and_survives_eviction(name, scheme, tmp_path):
    if lacking := missing(scheme.requires):
        pytest.skip(f"needs {', '.join(lacking)}")
    request = LoadRequest("demo", QuantPlan(default=QuantSpec(name, scheme.name)), device="cuda", store=tmp_path)
    if scheme.capability and torch.cuda.get_device_capability() < scheme.capability:
        with pytest.raises(DeviceUnsupported, match="of compute capability"):
            load_pipeline(request)
        return
    pipeline = load_pipeline(request)
    assert {parameter.device.type for model in pipeline.models.values() for parameter in model.parameters()} == {"cpu"}
    placements = pipeline.placements
    for component, model in pipeline.models.items():
        placements[component] = Placement(model, torch.device("cuda", 0), torch.device("cpu"))
    pipeline.on_use(torch.device("cuda", 0), lambda component: placements[component].load(1e12))
    if scheme.slow_eager:
        with pytest.raises(SpecError, match="compile it, or take another scheme"):
            generate(pipeline, SMALL)
        pipeline = optimize(pipeline, parse_optimization(compile="blocks"))
    images = generate(pipeline, SMALL)
    assert images.isfinite().all() and torch.equal(generate(pipeline, SMALL), images)
    plain = generate(load_pipeline(LoadRequest("demo")), SMALL)  # on the CPU
    assert (images - plain).abs().mean() < (0.03 if scheme.bits > 2 else 0.1)
    for placement in placements.values():
        assert placement.resident == placement.size
        placement.evict()
    assert {parameter.device.type for model in pipeline.models.values() for parameter in model.parameters()} == {"cpu"}
    again = GenerateRequest(**vars(SMALL) | {"remember": False})
    assert torch.equal(generate(pipeline, again), images)


@pytest.mark.parametrize(("name", "scheme"), SCHEMES, ids=lambda item: getattr(item, "name", item))
def test_a_layer_takes_any_view(name, scheme):
    if lacking := missing(scheme.requires):
        pytest.skip(f"needs {', '.join(lacking)}")
    if scheme.capability and torch.cuda.get_device_capability() < scheme.capability:
        pytest.skip("needs another GPU")
    backend, device = backends()[name], torch.device("cuda", 0)
    recipe = Recipe(scheme.name, backend.complete(scheme.name, {}), torch.bfloat16, device)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = torch.nn.Linear(IN, OUT, device=device, dtype=torch.bfloat16)
        layer = backend.quantize(plain, recipe).eval()
        for what, given in layouts(device).items():
            assert off(layer, given) < 0.02, what


@pytest.mark.parametrize(
    "plan", ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0"]
)
def test_streamed_weights_make_the_same_picture_and_leave_the_device(plan, tmp_path):
    pipeline = load_pipeline(LoadRequest("demo", parse_plan(plan), device="cuda", store=tmp_path))
    placements, room = pipeline.placements, [1e12]
    for component, model in pipeline.models.items():
        placements[component] = Placement(model, torch.device("cuda", 0), torch.device("cpu"))
    pipeline.on_use(torch.device("cuda", 0), lambda component: placements[component].load(room[0]))
    forgetful = GenerateRequest(**vars(SMALL) | {"remember": False})
    images = generate(pipeline, forgetful)
    for part in (0, 0.7):
        for placement in placements.values():
            placement.evict()
        room[0] = part * placements["transformer"].size
        for _ in range(2):
            assert torch.equal(generate(pipeline, forgetful), images)
        assert placements["transformer"].streams
    for placement in placements.values():
        placement.evict()
    assert {parameter.device.type for model in pipeline.models.values() for parameter in model.parameters()} == {"cpu"}


def test_the_noise_of_a_seed_is_that_of_the_cpu():
    images = []
    for device in ("cpu", "cuda"):
        pipeline = load_pipeline(LoadRequest("demo", dtype="float32"))
        pipeline.pipe.to(device)
        images.append(generate(pipeline, SMALL))
    assert (images[0] - images[1]).abs().mean() < 0.01


@pytest.mark.parametrize("plan", ["none", "torchao/int8wo", "torchao/fp8wo", "bitsandbytes_4bit/nf4", "gguf/Q8_0"])
@pytest.mark.parametrize("way", ["blocks", "whole"])
def test_compiled_is_close_to_eager_and_compiled_once(plan, way, tmp_path):
    pipeline = load_pipeline(LoadRequest("demo", parse_plan(plan), device="cuda", store=tmp_path))
    manage(pipeline, torch.device("cuda", 0))
    handle = optimize(pipeline, parse_optimization(compile=way))
    plain, fast = generate(pipeline, SMALL), generate(handle, SMALL)
    assert not handle.reports["compile"].eager and handle.reports["compile"].graphs
    assert (fast - plain).abs().mean() < 0.03
    generate(handle, GenerateRequest(**vars(SMALL) | {"seed": 4}))
    assert handle.reports["compile"].graphs == 0


@pytest.mark.parametrize(
    "plan", ["none", "torchao/int8wo", "bitsandbytes_4bit/nf4", "bitsandbytes_8bit/int8", "gguf/Q8_0"]
)
@pytest.mark.parametrize("way", ["model", "group", "group,stream", "group,type=leaf_level,stream"])
def test_offloading_of_diffusers_gives_the_same_picture_and_all_memory_back(plan, way, tmp_path):
    pipeline = load_pipeline(LoadRequest("demo", parse_plan(plan), device="cuda", store=tmp_path))
    manage(pipeline, torch.device("cuda", 0))
    plain = generate(pipeline, SMALL)
    try:
        handle = optimize(pipeline, parse_optimization(offload=way))
        assert way == "model" or not plan.startswith("bitsandbytes"), "its kernels would be given memory of the CPU"
    except SpecError as error:
        assert "stream" in way if plan.startswith("torchao") else plan.startswith("bitsandbytes"), error
        return
    assert torch.equal(generate(handle, SMALL), plain)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    generate(handle, SMALL)
    assert torch.cuda.memory_allocated() <= before
    assert {parameter.device.type for model in pipeline.models.values() for parameter in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("way", ["native", "_native_flash", "_native_efficient", "_native_cudnn", "flex"])
def test_attention_is_close(way, tmp_path):
    pipeline = load_pipeline(LoadRequest("demo", device="cuda", store=tmp_path))
    manage(pipeline, torch.device("cuda", 0))
    try:
        handle = optimize(pipeline, parse_optimization(attention=way))
    except SpecError as error:
        pytest.skip(str(error))
    assert (generate(handle, SMALL) - generate(pipeline, SMALL)).abs().mean() < 0.03
