"""Step caches: what they reuse is counted for real, what would not work is refused, and nothing of them stays."""

import gc
import weakref

import pytest
import torch

from quant_core import GenerateRequest, LoadRequest, SpecError, generate, load_pipeline, parse_optimization, step_cache
from quant_core.cache_ways import defaults
from quant_core.hooks import taken_back
from quant_core.metrics import psnr
from quant_core.request import call_arguments

CPU = torch.device("cpu")
RATIOS = "mag,ratios=1 1"
DEMO = ("first_block,threshold=0.3", "taylor", "taylor,lite", RATIOS, "pyramid", "faster,high=900")


def setting(text):
    return parse_optimization(cache=text).cache


def request(guided=True, steps=8):
    extra = {"true_cfg_scale": 3.0} if guided else {}
    return GenerateRequest("a lake at noon", width=64, height=64, steps=steps, extra=extra)


def video(guidance=5.0):
    return GenerateRequest("a cat", width=32, height=32, steps=6, guidance=guidance, extra={"num_frames": 5})


def cached(pipeline, text, wanted, on_step=None):
    """The picture, and what was reused."""
    with step_cache.applied(pipeline, setting(text), call_arguments(pipeline, wanted)) as reuse:
        return generate(pipeline, wanted, on_step), reuse


def attributes(pipeline):
    return [set(vars(part)) for model in pipeline.models.values() for part in model.modules()]


@pytest.mark.parametrize("text", DEMO)
def test_a_run_reuses_and_leaves_the_pipeline_as_it_was(pipelines, text):
    pipeline, wanted = pipelines("demo"), request(guided=text.split(",")[0] not in step_cache._ONE_STATE)
    step_cache.check(pipeline, setting(text), CPU)
    before, plain = attributes(pipeline), generate(pipeline, wanted)
    image, reuse = cached(pipeline, text, wanted)
    assert not torch.equal(image, plain)
    assert psnr(image, plain) > 15
    assert reuse.passes == (16 if "true_cfg_scale" in wanted.extra else 8)
    assert 0 < reuse.reused < reuse.passes
    assert 0 < reuse.skipped < 1
    assert str(reuse) == f"{text.split(',')[0]}: {reuse.reused} of {reuse.passes} passes reused"
    assert reuse.data()["reused"] == reuse.reused
    assert torch.equal(cached(pipeline, text, wanted)[0], image)
    assert torch.equal(generate(pipeline, wanted), plain)
    assert attributes(pipeline) == before


def test_a_threshold_of_0_reuses_nothing_and_a_huge_one_all_passes_after_the_first(pipelines):
    pipeline, wanted = pipelines("demo"), request()
    plain = generate(pipeline, wanted)
    image, reuse = cached(pipeline, "first_block,threshold=0", wanted)
    assert torch.equal(image, plain)
    assert (reuse.passes, reuse.reused, reuse.skipped) == (16, 0, 0.0)
    image, reuse = cached(pipeline, "first_block,threshold=1000", wanted)
    assert (reuse.passes, reuse.reused) == (16, 14)  # the first pass for each prompt is computed
    assert reuse.skipped == pytest.approx(14 * 4 / (16 * 5))  # four of the five blocks


def test_an_interval_says_how_many_passes_are_computed(pipelines):
    _, reuse = cached(pipelines("demo"), "pyramid,spatial=4,low=-1,high=1001", request(guided=False))
    assert (reuse.passes, reuse.reused, reuse.skipped) == (8, 6, 0.75)
    _, reuse = cached(pipelines("demo"), "pyramid,spatial=1", request(guided=False))
    assert (reuse.reused, reuse.skipped) == (0, 0.0)


@pytest.mark.parametrize(
    "text", ["first_block,threshold=0.3", "taylor,warm_up=2", "taylor,lite,warm_up=2", RATIOS, "sea"]
)
def test_video_with_passes_for_two_prompts(pipelines, text):
    pipeline = pipelines("wan")
    step_cache.check(pipeline, setting(text), CPU)
    plain = generate(pipeline, video())
    image, reuse = cached(pipeline, text, video())
    assert reuse.passes == 12 and reuse.reused > 0
    assert not torch.equal(image, plain)
    assert torch.equal(generate(pipeline, video()), plain)


@pytest.mark.parametrize("text", ["pyramid,cross=3", "faster"])
def test_video_with_one_pass_a_step(pipelines, text):
    pipeline = pipelines("wan")
    step_cache.check(pipeline, setting(text), CPU)
    with (
        pytest.raises(SpecError, match="guidance_scale to 1"),
        step_cache.applied(pipeline, setting(text), call_arguments(pipeline, video())),
    ):
        pass
    _, reuse = cached(pipeline, text, video(guidance=1.0))
    assert reuse.passes == 6 and reuse.reused > 0


def test_one_state_for_two_prompts_would_mix_them_up_so_it_is_refused(pipelines, monkeypatch):
    pipeline, text = pipelines("demo"), "pyramid,low=-1,high=1001"
    with pytest.raises(SpecError, match="would mix up .* set true_cfg_scale to 1"):
        cached(pipeline, text, request())
    monkeypatch.setattr(step_cache, "_check_passes", lambda *_: None)
    computed, contexts = [], []
    real = type(pipeline.pipe.transformer).cache_context

    def context(self, name, **known):
        contexts.append(name)
        return real(self, name, **known)

    monkeypatch.setattr(type(pipeline.pipe.transformer), "cache_context", context)
    processor = pipeline.pipe.transformer.transformer_blocks[0].attn.processor
    called = type(processor).__call__
    monkeypatch.setattr(
        type(processor), "__call__", lambda *args, **kw: computed.append(contexts[-1]) or called(*args, **kw)
    )
    cached(pipeline, text, request())
    assert set(contexts) == {"cond", "uncond"}
    assert set(computed) == {"cond"}, "the negative prompt has attention of its own after all: no need to refuse"


def test_a_first_pass_in_the_range_of_timesteps_has_nothing_to_take_over(pipelines):
    _, reuse = cached(pipelines("demo"), "faster,high=2000", request(guided=False))
    assert (reuse.passes, reuse.reused) == (8, 4)


def test_ratios_that_a_run_reports_can_be_given(pipelines):
    pipeline, wanted = pipelines("demo"), request()
    with pytest.raises(SpecError, match="a run with mag,calibrate reports them"):
        step_cache.check(pipeline, setting("mag"), CPU)
    step_cache.check(pipeline, setting("mag,calibrate"), CPU)
    image, reuse = cached(pipeline, "mag,calibrate", wanted)
    assert torch.equal(image, generate(pipeline, wanted))
    assert reuse.reused == 0 and len(reuse.ratios) == 8 and reuse.ratios[0] == 1
    measured = str(reuse).split("ratios=")[1]
    _, reuse = cached(pipeline, f"mag,threshold=0.5,ratios={measured}", wanted)
    assert reuse.reused > 0
    with pytest.raises(SpecError, match="numbers with spaces"):
        step_cache.check(pipeline, setting("mag,ratios=1;1"), CPU)


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("sd", "first_block", "no caching for UNet2DConditionModel; leave it off, as no other does"),
        ("sd3", "taylor", "no caching for SD3Transformer2DModel"),
        ("pixart", "pyramid", "no caching for PixArtTransformer2DModel"),
        ("zimage", "faster", "no caching for ZImageTransformer2DModel"),
        (
            "demo",
            "sea",
            "does not say at which noise level it is; use one of: faster, first_block, off, pyramid, taylor",
        ),
        ("wan", "mag", "ratios of this WanTransformer3DModel are not known"),
    ],
)
def test_what_would_not_work_is_refused_by_name_on_any_device(pipelines, name, text, why):
    before = attributes(pipelines(name))
    for device in ("cpu", "cuda"):
        with pytest.raises(SpecError, match=why):
            step_cache.check(pipelines(name), setting(text), torch.device(device))
    assert attributes(pipelines(name)) == before


def test_denoisers_and_pipelines_that_lack_what_a_way_needs(pipelines, monkeypatch):
    pipeline, denoiser = pipelines("demo"), pipelines("demo").pipe.transformer

    def refused(text, why):
        with pytest.raises(SpecError, match=why):
            step_cache.check(pipeline, setting(text), CPU)

    class Unknown(type(denoiser.transformer_blocks[0])):
        """A block that diffusers has no entry for."""

    with monkeypatch.context() as patch:
        patch.setattr(denoiser.transformer_blocks[1], "__class__", Unknown)
        refused("first_block", "does not know what Unknown of FluxTransformer2DModel returns")
        step_cache.check(pipeline, setting("taylor"), CPU)
    from diffusers.hooks._helpers import TransformerBlockRegistry

    entry = TransformerBlockRegistry.get(type(denoiser.single_transformer_blocks[0]))
    with monkeypatch.context() as patch:
        patch.setattr(entry, "return_encoder_hidden_states_index", None)  # as of FLUX.2
        refused("first_block", "the blocks of FluxTransformer2DModel do not all return the same")
        step_cache.check(pipeline, setting(RATIOS), CPU)
    with monkeypatch.context() as patch:
        patch.setattr(entry, "hidden_states_argument_name", "gen_seq")  # as of Cosmos 3
        refused(RATIOS, "call their input by another name")
    with monkeypatch.context() as patch:
        patch.setitem(denoiser._modules, "transformer_blocks", denoiser.transformer_blocks[:1])
        patch.setitem(denoiser._modules, "single_transformer_blocks", torch.nn.ModuleList())
        refused("first_block", "has 1 blocks in a row")
        patch.setitem(denoiser._modules, "transformer_blocks", torch.nn.ModuleList())
        refused("taylor", "reaches no block")
    with monkeypatch.context() as patch:
        patch.setitem(denoiser._modules, "proj_out", None)
        refused("taylor,lite", "no last layer by the name of proj_out")
    with monkeypatch.context() as patch:
        patch.delattr(type(pipeline.pipe), "current_timestep")
        refused("pyramid", "FluxPipeline does not say at which timestep it is; use one of: first_block, off, taylor")
    with monkeypatch.context() as patch:
        patch.setattr(type(pipeline.pipe), "__call__", lambda self: None)
        refused("first_block", "FluxPipeline does not tell its passes apart")


def test_all_comes_off_after_an_error_and_a_stop(pipelines):
    pipeline, wanted = pipelines("demo"), request()
    before, plain = attributes(pipeline), generate(pipeline, wanted)

    class Interrupt(BaseException):
        """As ComfyUI's is."""

    def stop(step):
        if step.done == 3:
            raise Interrupt

    with pytest.raises(Interrupt):
        cached(pipeline, "taylor", wanted, stop)
    assert attributes(pipeline) == before
    assert not pipeline.pipe.transformer.is_cache_enabled
    assert torch.equal(generate(pipeline, wanted), plain)


def test_a_forward_of_a_block_s_own_stays_and_is_run(pipelines):
    pipeline, wanted = pipelines("demo"), request()
    plain, calls, own = generate(pipeline, wanted), [], {}
    blocks = [*pipeline.pipe.transformer.transformer_blocks, *pipeline.pipe.transformer.single_transformer_blocks]

    def compiled(block):
        return lambda *args, **kwargs: calls.append(block) or type(block).forward(block, *args, **kwargs)

    try:
        for block in blocks:
            block.forward = own[block] = compiled(block)
        image, reuse = cached(pipeline, "first_block,threshold=1000", wanted)
        assert len(calls) == reuse.ran == 16 + 2 * 4
        assert all(vars(block)["forward"] is own[block] for block in blocks)
        assert not any("_diffusers_hook" in vars(block) for block in blocks)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    assert torch.equal(generate(pipeline, wanted), plain)


@pytest.mark.parametrize("text", [*DEMO, "mag,calibrate"])
def test_a_dropped_pipeline_is_freed_without_the_garbage_collector(text):
    pipeline = load_pipeline(LoadRequest("demo"))
    cached(pipeline, text, request(guided=False, steps=5))
    gc.collect()
    gc.disable()
    try:
        step_cache.check(pipeline, setting(text), CPU)
        _, reuse = cached(pipeline, text, request(guided=False, steps=5))
        denoiser = weakref.ref(pipeline.pipe.transformer)
        del pipeline
        assert denoiser() is None
    finally:
        gc.enable()


def test_a_hook_of_another_s_stays(pipelines):
    from diffusers.hooks import HookRegistry, ModelHook

    pipeline, wanted, seen = pipelines("demo"), request(guided=False), []
    block = pipeline.pipe.transformer.transformer_blocks[1]
    before, plain = attributes(pipeline), generate(pipeline, wanted)

    class Foreign(ModelHook):
        """Sees each call."""

        def pre_forward(self, module, *args, **kwargs):
            seen.append(module)
            return args, kwargs

    registry = HookRegistry.check_if_exists_or_initialize(block)
    registry.register_hook(Foreign(), "foreign")
    try:
        _, reuse = cached(pipeline, "first_block,threshold=1000", wanted)
        assert reuse.reused == 7
        assert list(registry.hooks) == ["foreign"]
        seen.clear()
        assert torch.equal(generate(pipeline, wanted), plain)
        assert seen == [block] * 8
    finally:
        registry.remove_hook("foreign")
        del block.forward, block._diffusers_hook
    assert attributes(pipeline) == before


def test_enabling_that_breaks_off_leaves_nothing(pipelines):
    pipeline = pipelines("demo")
    denoiser, before = pipeline.pipe.transformer, attributes(pipeline)
    with pytest.raises(RuntimeError, match="broken"), taken_back([denoiser]):
        from diffusers import FirstBlockCacheConfig

        denoiser.enable_cache(FirstBlockCacheConfig())
        raise RuntimeError("broken")
    assert attributes(pipeline) == before


def test_each_way_says_in_one_sentence_what_it_does_and_is_diffusers_own_default():
    import diffusers

    for way in step_cache.WAYS:
        assert way.help.endswith(").") and way.help.count(". ") == 0
        assert all(option.help for option in way.options)
    named = {
        "first_block": (diffusers.FirstBlockCacheConfig(), {"threshold": "threshold"}),
        "taylor": (
            diffusers.TaylorSeerCacheConfig(),
            {"interval": "cache_interval", "warm_up": "disable_cache_before_step", "order": "max_order"},
        ),
        "mag": (
            diffusers.MagCacheConfig(calibrate=True),
            {"threshold": "threshold", "most": "max_skip_steps", "keep": "retention_ratio"},
        ),
        "faster": (diffusers.FasterCacheConfig(), {"interval": "spatial_attention_block_skip_range"}),
        "sea": (
            diffusers.SeaCacheConfig(),
            {"threshold": "threshold", "order": "residual_order", "warm_up": "retention_steps"}
            | {"final": "cache_end_steps", "most": "max_consecutive_cached"},
        ),
    }
    for way in step_cache.WAYS:
        config, names = named.get(way.name, (None, {}))
        for ours, theirs in names.items():
            assert defaults(way).options[ours] == getattr(config, theirs)
    assert {"taylor", "pyramid", "faster"} == step_cache.INSIDE
