"""Attention backends: the one that was asked for computes, or is refused, and afterwards all is as before."""

import pytest
import torch

from quant_core import GenerateRequest, SpecError, attending, generate, parse_optimization
from quant_core.metrics import relative_error
from quant_core.settings import Setting

CPU = torch.device("cpu")
HERE = ["native", "flex", "_native_flash", "_native_math"]  # what PyTorch alone has for a CPU
REQUESTS = {
    "demo": GenerateRequest("a lake at noon", width=64, height=64, steps=2),
    "wan": GenerateRequest("a cat", width=32, height=32, steps=2, extra={"num_frames": 5}),
    "zimage": GenerateRequest("a cat", width=16, height=16, steps=2),
}


@pytest.fixture
def calls(monkeypatch):
    """The backends of diffusers that computed, in order."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    found = []
    for name, real in list(registry._backends.items()):

        def counted(*args, name=name, real=real, **kwargs):
            found.append(name.value)
            return real(*args, **kwargs)

        monkeypatch.setitem(registry._backends, name, counted)
    return found


def parsed(text):
    return parse_optimization(attention=text).attention


def state(pipeline):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    return registry.get_active_backend()[0], [
        dict(vars(part)) for part in attending._processors(pipeline.pipe.transformer)
    ]


def test_those_that_work_on_the_cpu_are_found():
    assert attending.usable(CPU) == HERE
    assert set(attending.usable(torch.device("cuda"))) >= {*HERE, "_native_cudnn", "_native_efficient"}


@pytest.mark.parametrize("way", HERE)
@pytest.mark.parametrize("name", REQUESTS)
def test_it_computes_and_all_is_as_before(pipelines, calls, name, way):
    pipeline, setting = pipelines(name), parsed(way)
    attending.check(pipeline, setting, CPU)
    before, plain = state(pipeline), generate(pipeline, REQUESTS[name])
    assert set(calls) == {"native"}
    calls.clear()
    with attending.applied(pipeline, setting, {}) as report:
        if (name, way) == ("zimage", "_native_flash"):
            with pytest.raises(SpecError, match="not supported for native flash"):
                generate(pipeline, REQUESTS[name])
        else:
            assert relative_error(generate(pipeline, REQUESTS[name]), plain) < 0.02
    assert set(calls) == {way}
    assert str(report) == f"attention {way}" and report.data() == {"way": way}
    assert state(pipeline) == before
    calls.clear()
    assert torch.equal(generate(pipeline, REQUESTS[name]), plain)
    assert set(calls) == {"native"}


def test_an_error_takes_it_back_too(pipelines, caplog):
    pipeline, setting = pipelines("demo"), parsed("_native_math")
    before = state(pipeline)
    with pytest.raises(RuntimeError, match="broken"), attending.applied(pipeline, setting, {}):
        assert state(pipeline) != before
        raise RuntimeError("broken")
    assert state(pipeline) == before
    assert not caplog.records


def test_what_was_set_before_comes_back(pipelines):
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry

    pipeline = pipelines("demo")
    default, _ = registry.get_active_backend()
    plain = state(pipeline)
    try:
        pipeline.pipe.transformer.set_attention_backend("flex")
        before = state(pipeline)
        with attending.applied(pipeline, parsed("_native_math"), {}):
            pass
        assert state(pipeline) == before
        assert before[0] == "flex"
    finally:
        registry.set_active_backend(default)
        for processor in attending._processors(pipeline.pipe.transformer):
            vars(processor).pop("_attention_backend", None)
    assert state(pipeline) == plain


@pytest.mark.parametrize(
    "name, denoiser", [("sd", "UNet2DConditionModel"), ("sd3", "SD3Transformer2DModel"), ("pixart", "PixArt")]
)
def test_a_denoiser_that_would_ignore_it_is_refused_by_name(pipelines, calls, name, denoiser):
    for device in ("cpu", "cuda"):
        with pytest.raises(
            SpecError, match=f"{denoiser}.* computes its attention in its own way; set attention to off"
        ):
            attending.check(pipelines(name), Setting("native"), torch.device(device))
    if name == "sd":
        pipelines(name).pipe.unet.set_attention_backend("native")  # as it is without the check
        generate(pipelines(name), GenerateRequest("a cat", width=16, height=16, steps=1))
        assert not calls


@pytest.mark.parametrize(
    "way, device, why",
    [
        ("flash", "cpu", "runs on cuda, not on cpu; use one of: _native_flash, _native_math, flex, native, off"),
        ("_native_cudnn", "cpu", "runs on cuda, not on cpu"),
        ("_native_efficient", "cpu", "runs on cuda, not on cpu"),
        ("flex", "mps", "runs on cpu or cuda, not on mps; use one of: _native_math, native, off"),
        ("flash", "cuda", "it needs: pip install 'flash-attn>=2.6.3'; use one of: .*_native_cudnn"),
        ("sage_varlen", "cuda", "it needs: pip install 'sageattention>=2.1.1'"),
        ("xformers", "cuda", "it needs: pip install 'xformers>=0.0.29'"),
        ("_flash_3", "cuda", "build FlashAttention 3 from its source"),
    ],
)
def test_what_is_not_here_is_refused_with_the_remedy(pipelines, monkeypatch, way, device, why):
    monkeypatch.setattr(attending, "missing", lambda requires: list(requires))
    monkeypatch.setattr("diffusers.models.attention_dispatch._CAN_USE_FLASH_ATTN_3", False)
    with pytest.raises(SpecError, match=why):
        attending.check(pipelines("demo"), parsed(way), torch.device(device))


def test_a_gpu_that_is_too_old_and_a_dtype_that_does_not_fit(pipelines, monkeypatch):
    pipeline, cuda = pipelines("demo"), torch.device("cuda")
    setting = parsed("_native_cudnn")
    attending.check(pipeline, setting, cuda)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "dtype", torch.float32)
        with pytest.raises(SpecError, match="takes bfloat16 or float16, and this pipeline is in float32"):
            attending.check(pipeline, setting, cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(SpecError, match="compute capability 8.0 or newer, and this one has 7.5"):
        attending.check(pipeline, setting, cuda)


def test_none_that_downloads_a_kernel(pipelines, no_network):
    from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY as hub
    from diffusers.models.attention_dispatch import AttentionBackendName as Name

    names = {way.name for way in attending.WAYS}
    assert names.isdisjoint(name.value for name in hub)
    assert {name.value for name in Name} - names - {name.value for name in hub} == {"_native_npu", "_native_xla"}
    for name in hub:
        with pytest.raises(SpecError, match="download a kernel from the hub and run it, which is never done here"):
            parsed(name.value)
        with pytest.raises(SpecError, match="download a kernel"):
            attending.check(pipelines("demo"), Setting(name.value), CPU)
    assert parsed("off") is None
    with pytest.raises(SpecError, match="attention has no 'nativ'"):
        parsed("nativ")


def test_the_packages_are_those_that_diffusers_asks_for():
    from diffusers.models import attention_dispatch as theirs

    asked = {requirement for kernel in attending._KERNELS.values() for requirement in kernel.requires}
    assert asked == {
        f"flash-attn>={theirs._REQUIRED_FLASH_VERSION}",
        f"sageattention>={theirs._REQUIRED_SAGE_VERSION}",
        f"xformers>={theirs._REQUIRED_XFORMERS_VERSION}",
    }
