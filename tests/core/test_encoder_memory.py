"""Text encoders answer from memory what they have answered before: with the same bits, and nothing else."""

import gc
import weakref

import pytest
import torch
from torch import nn

from quant_core import generate, lane
from quant_core.memory import EncoderMemory
from quant_core.transfer import adopt, copies

from .simulated_device import CPU, Card, manage, resident
from .small_requests import SIDES, load, small

GUIDED = {"demo": {"extra": {"true_cfg_scale": 2.0}}}  # the others contrast with a negative prompt by themselves


def watch(pipeline):
    """The names of the text encoders that ran, one for each call."""
    ran = []
    for name in pipeline.index.text_encoders:
        module = pipeline.models[name]
        names = ("embed_tokens", "token_embedding")
        layer = next(part for name, part in module.named_modules() if name.endswith(names))
        layer.register_forward_hook(lambda *_, name=name: ran.append(name))
    return ran


def used_here(tiny, name, plan=""):
    """A pipeline that a host uses on the CPU."""
    pipeline = load(tiny, name, plan)
    pipeline.on_use(CPU, lambda name: None)
    return pipeline


@pytest.mark.parametrize(
    ("name", "managed"), [*((name, False) for name in SIDES), *((name, True) for name in ("sd3", "zimage"))]
)
def test_only_what_changed_is_encoded_again(tiny, name, managed):
    pipeline = load(tiny, name)
    if managed:
        manage(pipeline, card := Card(part=0))
    else:
        pipeline.on_use(CPU, lambda name: None)
    plain = load(tiny, name)
    ran = watch(pipeline)

    def runs(prompt="a cat", negative="rain", **settings):
        ran.clear()
        settings = {"negative_prompt": negative} | GUIDED.get(name, {}) | settings
        if name == "demo":
            settings["extra"] = {"true_cfg_scale": 2.0}
        request = small(name, prompt, **settings)
        image = generate(pipeline, request)
        found = list(ran)
        assert torch.equal(image, generate(plain, request))
        return found

    first = runs()
    assert set(first) == set(pipeline.index.text_encoders)
    if managed:
        for placement in pipeline.placements.values():
            placement.evict()
    assert runs(seed=5) == []
    assert runs(steps=3) == []
    if name != "demo":  # which is guided by an extra argument
        assert runs(guidance=3.0) == []
    if managed:
        assert not any(pipeline.placements[encoder].resident for encoder in pipeline.index.text_encoders)
        assert card.used == resident(pipeline) > 0
    changed = runs("a dog")
    assert changed and set(changed) <= set(first)
    assert runs() == runs("a dog") == []
    negative = runs(negative="snow")
    assert negative and len(negative) < len(first)
    assert runs(remember=False) == first
    assert runs() == []


def change_in_place(encoder):
    with torch.no_grad():
        next(encoder.parameters()).add_(0.5)


def change_buffer(encoder):
    """Weights that are written to through a view of them."""
    with torch.no_grad():
        list(encoder.parameters())[-1].data[:1].mul_(3)


def replace(encoder):
    layer = next(part for part in encoder.modules() if isinstance(part, nn.LayerNorm) or "Norm" in type(part).__name__)
    layer.weight = nn.Parameter(layer.weight + 1, requires_grad=False)


@pytest.mark.parametrize("managed", [False, True], ids=["on the CPU", "evicted"])
@pytest.mark.parametrize("name", ["sd", "zimage"])
def test_an_encoder_whose_weights_change_is_asked_again(tiny, name, managed):
    pipeline = load(tiny, name)
    if managed:
        manage(pipeline, Card(part=0))
    else:
        pipeline.on_use(CPU, lambda name: None)
    ran, encoder, seen = watch(pipeline), pipeline.models["text_encoder"], []
    for change in (lambda _: None, change_in_place, replace, replace, replace):
        if managed:
            pipeline.placements["text_encoder"].evict()
        change(encoder)
        ran.clear()
        image = generate(pipeline, small(name))
        assert ran and not any(torch.equal(image, other) for other in seen)
        ran.clear()
        assert torch.equal(generate(pipeline, small(name, remember=False)), image)
        ran.clear()
        assert torch.equal(generate(pipeline, small(name)), image) and not ran
        seen.append(image)


def test_weights_that_go_into_page_locked_memory_are_the_same_weights(tiny, monkeypatch):
    """As a GPU has them from the first time that they are streamed."""

    def pin(lane, modules):
        adopt(copies(modules, torch.clone, CPU))
        return True

    monkeypatch.setattr(lane.Lane, "pin", pin)
    pipeline = load(tiny, "sd3")
    manage(pipeline, Card(part=0))
    ran = watch(pipeline)
    image = generate(pipeline, small("sd3"))
    assert ran
    ran.clear()
    assert torch.equal(generate(pipeline, small("sd3")), image) and not ran


def test_a_part_of_an_evicted_encoder_is_ready_when_a_pipeline_calls_it(tiny, monkeypatch):
    import transformers

    # diffusers looks for the layers where transformers 4 had them
    monkeypatch.setattr(transformers.CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    plain = load(tiny, "sd")
    request = small("sd", extra={"clip_skip": 1})
    expected = generate(plain, request)
    assert not torch.equal(generate(plain, small("sd")), expected)
    pipeline, card = load(tiny, "sd"), Card(part=0)
    used = manage(pipeline, card)
    ran = watch(pipeline)
    assert torch.equal(generate(pipeline, request), expected)
    encoder = pipeline.placements["text_encoder"]
    encoder.evict()
    used.clear()
    ran.clear()
    assert torch.equal(generate(pipeline, request), expected)
    assert not ran and used[0] == "text_encoder" and encoder.resident
    encoder.evict()
    with torch.no_grad():  # a block is there too, when it is called by itself
        block = pipeline.models["text_encoder"].encoder.layers[1]
        block(torch.zeros(1, 4, 32, dtype=torch.bfloat16), attention_mask=None)


def test_outputs_with_a_cache_of_keys_and_values_are_kept_without_it(tiny):
    pipeline = used_here(tiny, "zimage")
    encoder = pipeline.models["text_encoder"]
    ids = torch.tensor([[1, 2, 3]])
    plain = load(tiny, "zimage").models["text_encoder"](input_ids=ids, output_hidden_states=True)
    assert plain.past_key_values is not None
    ran = watch(pipeline)
    for count in (1, 1):
        output = encoder(input_ids=ids, output_hidden_states=True)
        assert type(output) is type(plain) and len(ran) == count
        assert torch.equal(output.last_hidden_state, plain.last_hidden_state)
        assert all(map(torch.equal, output.hidden_states, plain.hidden_states))
    assert output.past_key_values is None


def test_what_is_done_to_an_answer_does_not_change_the_next(tiny):
    pipeline = used_here(tiny, "sd3")
    ids = torch.tensor([[3, 4, 5]])
    for name in pipeline.index.text_encoders:
        encoder = pipeline.models[name]
        expected = encoder(ids)[0].clone()
        for _ in range(3):
            answer = encoder(ids)
            assert torch.equal(answer[0], expected)
            answer[0].zero_()
        ids_too = ids.clone()
        encoder(ids_too)
        ids_too.zero_()
        assert torch.equal(encoder(ids)[0], expected)


def test_calls_that_differ_in_anything_are_answered_apart(tiny):
    pipeline = used_here(tiny, "sd3")
    encoder, ran = pipeline.models["text_encoder"], watch(pipeline)
    ids = torch.tensor([[3, 4, 5]])
    calls = [
        ((ids,), {}),
        ((ids.int(),), {}),
        ((ids.reshape(3, 1),), {}),
        ((ids + 1,), {}),
        ((), {"input_ids": ids}),
        ((ids,), {"output_hidden_states": True}),
        ((ids,), {"return_dict": False}),
        ((ids,), {"attention_mask": torch.ones(1, 3)}),
        ((ids,), {"attention_mask": torch.tensor([[1.0, 1.0, 0.0]])}),
    ]
    for count, (args, kwargs) in enumerate(calls, 1):
        expected = type(encoder).forward(encoder, *args, **kwargs)
        ran.clear()
        for _ in range(2):
            answer = encoder(*args, **kwargs)
            assert type(answer) is type(expected) and torch.equal(answer[0], expected[0])
            assert len(answer) == len(expected)
        assert len(ran) == 1 and len(pipeline.memory._kept) == count
    other = pipeline.models["text_encoder_2"](ids)
    assert not torch.equal(other[0], encoder(ids)[0]), "another encoder has other answers"


def test_arguments_and_outputs_of_unknown_types_are_not_remembered():
    class Unknown:
        pass

    class Encoder(nn.Module):
        ran = 0

        def forward(self, x, other=None):
            self.ran += 1
            return {"x": x + 1, "other": other}

    class Hook:
        execution_device = CPU
        running = False

        def enter(self, module, args, kwargs):
            return args, kwargs

        def weights(self, module):
            return module.parameters()

    from quant_core.memory import remembering

    encoder, memory = Encoder(), EncoderMemory()
    remembering(encoder, "encoder", memory, Hook())
    x = torch.ones(2)
    for other, runs in ((None, 1), (1, 1), (True, 1), ("a", 1), ([1, (2.0, {"b": x})], 1), (Unknown(), 3), ({1}, 3)):
        before = encoder.ran
        for _ in range(3):
            answer = encoder(x, other=other)
            assert torch.equal(answer["x"], x + 1)
        assert encoder.ran - before == runs, other


def output(size, value=0):
    return {"hidden": torch.full((size,), value, dtype=torch.uint8)}


def test_the_least_recently_used_is_forgotten_beyond_the_limit():
    memory = EncoderMemory(limit=100)

    def known():
        return [key for key in ("a", "b", "c", "d") if (key,) in memory._kept]

    for value, key in enumerate("abc"):
        memory.keep((key,), output(40, value))
        assert memory.size <= 100
    assert known() == ["b", "c"] and memory.size == 80
    assert memory.recall(("a",), CPU) is None
    assert torch.equal(memory.recall(("b",), CPU)["hidden"], output(40, 1)["hidden"])
    memory.keep(("d",), output(20))
    assert known() == ["b", "c", "d"] and memory.size == 100
    memory.keep(("a",), output(1))
    assert known() == ["a", "b", "d"], "c was used longest ago"
    memory.keep(("c",), output(101))
    assert known() == ["a", "b", "d"] and memory.size == 61, "what is larger than all of it displaces nothing"
    memory.keep(("b",), output(30))
    assert memory.size == 51
    shared = torch.zeros(10, dtype=torch.uint8)
    memory.forget()
    assert memory.size == 0 and known() == []
    memory.keep(("a",), (shared, [shared], {"again": shared}))
    assert memory.size == 10
    first, (second,), again = memory.recall(("a",), CPU)
    assert first is second is again["again"] and torch.equal(first, shared)


def test_a_small_memory_gives_the_same_pictures(tiny):
    pipeline, plain = used_here(tiny, "sd3"), load(tiny, "sd3")
    for limit in (0, 25000, 60000):
        pipeline.memory.forget()
        pipeline.memory.limit = limit
        for prompt in ("a cat", "a dog", "a cat", "a cow"):
            assert torch.equal(generate(pipeline, small("sd3", prompt)), generate(plain, small("sd3", prompt)))
            assert pipeline.memory.size <= limit
        assert (pipeline.memory.size > 0) == (limit > 0)


def test_what_is_remembered_is_freed_with_the_pipeline(tiny):
    pipeline = used_here(tiny, "sd3")
    generate(pipeline, small("sd3"))
    memory = weakref.ref(pipeline.memory)
    kept = [
        weakref.ref(tensor)
        for entry in pipeline.memory._kept.values()
        for tensor in entry[0].values()
        if isinstance(tensor, torch.Tensor)
    ]
    assert kept
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert memory() is None and not any(ref() is not None for ref in kept)
    finally:
        gc.enable()
