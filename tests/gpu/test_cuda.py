"""Every scheme on a CUDA device, where there is one."""

import pytest
import torch

from quant_core import (
    DeviceUnsupported,
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    QuantSpec,
    backends,
    generate,
    load_pipeline,
    missing,
    move,
)

pytestmark = pytest.mark.gpu

SMALL = GenerateRequest("a lake at noon", width=128, height=128, steps=2, seed=3, max_sequence_length=48)
SCHEMES = [(name, scheme) for name, backend in backends().items() for scheme in backend.schemes if scheme.bits]


@pytest.mark.parametrize(("name", "scheme"), SCHEMES, ids=lambda item: getattr(item, "name", item))
def test_a_scheme_quantizes_runs_and_survives_eviction(name, scheme, tmp_path):
    if lacking := missing(scheme.requires):
        pytest.skip(f"needs {', '.join(lacking)}")
    request = LoadRequest("demo", QuantPlan(default=QuantSpec(name, scheme.name)), device="cuda", cache=tmp_path)
    if scheme.capability and torch.cuda.get_device_capability() < scheme.capability:
        with pytest.raises(DeviceUnsupported, match="of compute capability"):
            load_pipeline(request)
        return
    pipeline = load_pipeline(request)
    assert {parameter.device.type for model in pipeline.models.values() for parameter in model.parameters()} == {"cpu"}
    pipeline.pipe.to("cuda")
    images = generate(pipeline, SMALL)
    assert images.isfinite().all() and torch.equal(generate(pipeline, SMALL), images)
    for model in pipeline.models.values():
        move(model, torch.device("cpu"))
        move(model, torch.device("cuda"))
    assert torch.equal(generate(pipeline, SMALL), images)


def test_the_noise_of_a_seed_is_that_of_the_cpu():
    images = []
    for device in ("cpu", "cuda"):
        pipeline = load_pipeline(LoadRequest("demo", dtype="float32"))
        pipeline.pipe.to(device)
        images.append(generate(pipeline, SMALL))
    assert (images[0] - images[1]).abs().mean() < 0.01
