"""Components whose weights are on a device as far as there is room: always the same bits, and always accounted for."""

import gc
import weakref

import pytest
import torch
from torch import nn

from quant_core import Placement, generate
from quant_core.blocks import spread
from quant_core.lane import AHEAD

from .simulated_device import CPU, DEVICE, Card, budget, manage, place, resident
from .small_requests import SIDES, load, small
from .test_moving import SCHEMES

STREAMED = [scheme for scheme in SCHEMES if scheme != "quanto/int4"]
PARTS = (0, 0.2, 0.4, 0.6, 0.8, 1)  # of the room between the least that a component takes and its size


class Layers(nn.Module):
    """A model of blocks that run in an order other than that of their registration, as those of UNets do."""

    def __init__(self, order=(0, 4, 2, 1, 3, 5), width=16):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in order)
        self.order = order
        self.ran = []
        for index, block in enumerate(self.blocks):
            block.register_forward_pre_hook(lambda *_, index=index: self.ran.append(index))

    def forward(self, x):
        x = self.first(x)
        for index in self.order:
            x = torch.tanh(self.blocks[index](x))
        return x


def layers(card, part, **settings):
    torch.manual_seed(0)
    model = Layers(**settings)
    model.requires_grad_(False)
    placement = place(model, card)
    placement.load(budget(placement, part))
    return model, placement


@pytest.mark.parametrize("name", SIDES)
def test_every_module_is_in_one_unit_and_the_sizes_add_up(tiny, name):
    for component, module in load(tiny, name).models.items():
        placement = Placement(module, DEVICE, CPU)
        inside = [id(part) for unit in placement._units for part in unit.modules]
        assert sorted(inside) == sorted(map(id, module.modules())), component
        blocks = sorted((unit.size for unit in placement._blocks), reverse=True)
        assert placement.size == placement._rest.size + sum(blocks)
        assert placement.least == placement._rest.size + sum(blocks[:AHEAD]) <= placement.size
        assert blocks and all(block * 1000 >= placement.size for block in blocks)
        first = next(module.parameters())  # where the libraries look for a model's device
        assert any(first is weight for part in placement._rest.modules for weight in part._parameters.values())


def test_large_blocks_of_a_unet_are_divided(tiny):
    unet = load(tiny, "sd").models["unet"]
    placement = Placement(unet, DEVICE, CPU)
    units = {id(unit.modules[0]) for unit in placement._blocks}
    assert id(unet.down_blocks[1]) not in units
    assert all(id(part) in units for part in (*unet.down_blocks[1].resnets, *unet.mid_block.attentions))
    assert max(unit.size for unit in placement._blocks) * 4 < placement.size


def test_blocks_that_share_weights_stay_with_the_rest():
    model = Layers()
    model.blocks[1].weight = model.first.weight  # with what is in no block
    model.blocks[3].weight = model.blocks[2].weight  # with another block
    model.blocks[5] = model.blocks[4]  # twice in the model
    placement = Placement(model, DEVICE, CPU)
    assert [unit.modules for unit in placement._blocks] == [[model.blocks[0]]]
    nested = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]) for _ in range(3)])
    model = nn.Sequential(nested)
    placement = Placement(model, DEVICE, CPU)  # of a list nothing runs but what it holds
    assert [unit.modules for unit in placement._blocks] == [[layer] for inner in nested for layer in inner]


@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_module_in_two_blocks_runs_and_goes_home(part):
    model = Layers()
    shared = nn.Linear(16, 16)
    for index in (0, 2, 3):
        model.blocks[index] = nn.Sequential(nn.Linear(16, 16), shared)
    home = dict(model.named_parameters())
    x = torch.ones(2, 16)
    expected = model(x)
    placement = place(model, Card())
    for _ in range(2):
        placement.load(budget(placement, part))
        assert torch.equal(model(x), expected)
        placement.evict()
        assert all(weight is home[name] for name, weight in model.named_parameters())


@pytest.mark.parametrize("name", SIDES)
def test_what_is_resident_keeps_to_the_budget_and_grows_with_it(tiny, name):
    for module in load(tiny, name).models.values():
        card = Card()
        placement = Placement(module, DEVICE, CPU, card.copy)
        before = 0
        for step in range(0, 24):
            room = placement.size * step // 20
            added = placement.load(room)
            assert added == placement.resident == card.used
            assert added <= room or not any(unit.resident for unit in placement._blocks)
            assert added >= before and (added == placement.size) == (room >= placement.size)
            assert placement.streams == (added < placement.size)
            before = added
            placement.evict()
            assert placement.resident == card.used == 0 and not placement.streams
        for step in range(1, 21):  # what is resident stays
            placement.load(placement.size * step // 20)
            assert card.used == placement.resident
        assert placement.resident == placement.size
        placement.evict()


@pytest.mark.parametrize("name", SIDES)
def test_the_picture_is_the_same_however_much_fits(tiny, name):
    expected = generate(load(tiny, name), small(name))
    pipeline, card = load(tiny, name), Card()
    manage(pipeline, card)
    for card.part in PARTS:
        for placement in pipeline.placements.values():
            placement.evict()
        assert torch.equal(generate(pipeline, small(name, remember=False)), expected), card.part
        assert card.used == resident(pipeline)
    assert card.used == sum(placement.size for placement in pipeline.placements.values())


@pytest.mark.parametrize("scheme", STREAMED)
def test_streamed_weights_of_every_scheme_make_the_same_picture(tiny, scheme):
    pipeline, card = load(tiny, "sd3", scheme), Card()
    expected = generate(pipeline, small("sd3"))
    objects = {name: list(map(id, module.parameters())) for name, module in pipeline.models.items()}
    manage(pipeline, card)
    for card.part in (0, 0.5):
        assert torch.equal(generate(pipeline, small("sd3", remember=False)), expected)
        assert card.used == resident(pipeline)
        for placement in pipeline.placements.values():
            assert placement.streams or card.part
            placement.evict()
        assert card.used == 0
    assert {name: list(map(id, module.parameters())) for name, module in pipeline.models.items()} == objects


@pytest.mark.parametrize("name", ["sd", "sd3", "wan", "demo"])
@pytest.mark.parametrize("part", [0, 0.5])
def test_no_more_is_on_the_device_than_what_stays_and_three_blocks(tiny, name, part):
    pipeline = load(tiny, name)
    cards = {component: Card() for component in pipeline.models}
    manage(pipeline, Card(part), cards=cards)
    generate(pipeline, small(name))
    for component, placement in pipeline.placements.items():
        largest = sorted((unit.size for unit in placement._blocks), reverse=True)[:AHEAD]
        assert 0 < cards[component].peak <= placement.resident + sum(largest), component
        assert not part or not placement.streams or placement.resident + sum(largest) <= budget(placement, part)


def test_blocks_are_fetched_in_the_order_in_which_they_run_one_ahead():
    card = Card(0)
    model, placement = layers(card, 0)
    x, events = torch.ones(1, 16), []
    indices = {id(unit): index for index, unit in enumerate(placement._blocks)}
    bring = placement._bring

    def noting(unit):
        events.append(("copy", indices[id(unit)]))
        bring(unit)

    placement._bring = noting
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, index=index: events.append(("run", index)))
    model(x)
    assert sum(kind == "copy" for kind, _ in events) > len(model.order) + 1, "the order was not known yet"
    model(x)  # shows what comes after the last block
    for _ in range(3):
        events.clear()
        model(x)
        ahead = [*model.order[1:], model.order[0]]
        assert events == [
            event for pair in zip(model.order, ahead, strict=True) for event in (("copy", pair[1]), ("run", pair[0]))
        ]


@pytest.mark.parametrize("part", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_a_streamed_block_is_fetched_while_those_before_it_compute(part):
    card = Card()
    model, placement = layers(card, part, order=(0, 12, 2, 1, 3, 5, 4, 6, 8, 10, 7, 9, 11))
    x = torch.ones(1, 16)
    streamed = [index for index in model.order if not placement._blocks[index].resident]
    assert 2 <= len(streamed) < len(model.order)
    for _ in range(2):  # what comes after the last block shows at the beginning of the second pass
        model(x)
    fetched = {}  # streamed block -> how many blocks of this pass had begun to run when it was fetched
    bring, indices = placement._bring, {id(unit): index for index, unit in enumerate(placement._blocks)}

    def noting(unit):
        fetched.setdefault(indices[id(unit)], []).append(len(model.ran))
        bring(unit)

    placement._bring = noting
    for _ in range(2):
        fetched.clear()
        model.ran.clear()
        model(x)
        assert sorted(fetched) == sorted(streamed) and all(len(times) == 1 for times in fetched.values())
        for index in streamed[1:]:
            assert fetched[index][0] <= model.order.index(index), "it would wait for its weights"


def test_the_streamed_blocks_are_spread_evenly():
    for count in range(1, 40):
        units = list(range(count))
        order = spread(units)
        assert sorted(order) == units
        for streamed in range(1, count + 1):
            places = [-1, *sorted(order[:streamed]), count]
            assert (
                max(after - before for before, after in zip(places, places[1:], strict=False)) <= 4 * count / streamed
            )


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder_2"])
def test_unloading_frees_what_is_asked_for_or_all_blocks(tiny, component):
    module, card = load(tiny, "demo").models[component], Card()
    placement = Placement(module, DEVICE, CPU, card.copy)
    placement.load(placement.size)
    blocks = placement.size - placement._rest.size
    for amount in (0, 1, blocks // 3, blocks // 2, blocks, 10 * blocks):
        before, evictions, copied = placement.resident, placement.evictions, card.copied
        freed = placement.unload(amount)
        assert freed == before - placement.resident and card.used == placement.resident
        assert freed >= min(amount, blocks)
        assert freed < amount + max(unit.size for unit in placement._blocks)
        assert (placement.evictions > evictions) == (freed > 0)
        assert card.copied == copied, "what leaves is not copied"
        placement.load(placement.size)
    assert placement.unload(placement.size) == blocks and placement.unload(1) == 0
    assert placement.resident == placement._rest.size and placement.streams


class Full(MemoryError):
    pass


@pytest.mark.parametrize("error", [Full, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("part", [0, 0.5, 1])
def test_a_copy_that_fails_leaves_all_as_it_was(error, part):
    """At every copy of a load and three runs, one after the other."""
    card = Card()
    model, placement = layers(card, part)
    x = torch.ones(2, 16)
    expected = model(x)
    placement.evict()
    home = dict(model.named_parameters())
    raised = 0
    for count in range(1, 200):
        start = card.copied
        card.fail(count, error("full"))
        loaded = False
        try:
            placement.load(budget(placement, part))
            loaded = True
            for _ in range(3):
                model(x)
        except error:
            raised += 1
            assert loaded or placement.resident == 0
        placement.settle()
        assert card.used == placement.resident == sum(u.size for u in placement._units if u.device == DEVICE)
        done = card.copied - start < count
        card.failing = []
        placement.load(budget(placement, part))
        assert torch.equal(model(x), expected)
        placement.evict()
        assert card.used == placement.resident == 0
        assert all(weight is home[name] for name, weight in model.named_parameters())
        if done:
            break
    assert raised == count - 1 >= 14


@pytest.mark.parametrize("name", ["sd", "zimage"])
def test_a_run_that_fails_at_any_copy_can_be_repeated(tiny, name):
    pipeline, card = load(tiny, name), Card(part=0.3)
    request = small(name, remember=False)
    expected = generate(pipeline, request)
    manage(pipeline, card)
    generate(pipeline, request)
    copied = card.copied
    generate(pipeline, request)
    copied = card.copied - copied
    assert copied > 40
    for count in [1, 2, *range(5, copied, copied // 12), copied]:
        card.fail(count, torch.OutOfMemoryError("full"))
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            generate(pipeline, request)
        assert card.used == resident(pipeline)
    card.failing = []
    assert torch.equal(generate(pipeline, request), expected)
    assert card.used == resident(pipeline)


def test_what_becomes_resident_while_it_is_streamed_stays():
    card = Card()
    model, placement = layers(card, 0)
    x = torch.ones(1, 16)
    expected = model(x)
    model(x)
    assert card.used > placement.resident, "the first block of the next pass is there already"
    placement.load(placement.size)
    for _ in range(2):
        assert torch.equal(model(x), expected)
        assert placement.resident == placement.size == card.used
    placement.settle()
    assert placement.resident == placement.size == card.used


class Cancelled(BaseException):
    pass


@pytest.mark.parametrize("component", ["text_encoder_2", "transformer", "vae"])
@pytest.mark.parametrize("part", [0, 1])
def test_each_block_can_be_stopped_before_it_runs(tiny, component, part):
    """Also within the VAE's decoder, and where all blocks are resident."""
    pipeline, card, request = load(tiny, "demo"), Card(part), small("demo", remember=False)
    expected = generate(pipeline, request)
    manage(pipeline, card)
    placement = pipeline.placements[component]
    calls, stop_at = [], None

    def check():
        calls.append(None)
        if len(calls) == stop_at:
            raise Cancelled

    placement.check = check
    generate(pipeline, request)
    total = len(calls)
    steps = request.steps if component == "transformer" else 1
    blocks = len(placement._blocks) if component != "vae" else 8  # those of the decoder are run alone
    assert total >= steps * blocks
    for stop_at in (1, total // 2, total):
        calls.clear()
        with pytest.raises(Cancelled):
            generate(pipeline, request)
        assert len(calls) == stop_at
        assert card.used == resident(pipeline)
    stop_at = None
    assert torch.equal(generate(pipeline, request), expected)


@pytest.mark.parametrize("how", ["ran", "stopped within a block", "failed to copy"])
@pytest.mark.parametrize("name", ["sd", "demo"])
def test_what_was_streamed_is_freed_with_the_pipeline(tiny, name, how):
    """By reference counting alone."""
    pipeline, card = load(tiny, name), Card(part=0)
    manage(pipeline, card)
    denoiser = next(name for name in ("unet", "transformer") if name in pipeline.models)
    generate(pipeline, small(name))
    gc.collect()
    gc.disable()
    try:
        if how == "stopped within a block":
            placement = pipeline.placements[denoiser]
            layer = placement._blocks[-1].modules[-1]

            def stop(*_):
                raise Cancelled

            hook = layer.register_forward_hook(stop)
            with pytest.raises(Cancelled):
                generate(pipeline, small(name))
            hook.remove()
            del placement, layer, hook, stop
        elif how == "failed to copy":
            card.fail(150, torch.OutOfMemoryError("full"))
            with pytest.raises(torch.OutOfMemoryError):
                generate(pipeline, small(name, remember=False))
        modules = [weakref.ref(module) for module in pipeline.models.values()]
        weights = [weakref.ref(weight) for module in pipeline.models.values() for weight in module.parameters()]
        del pipeline
        assert [ref() for ref in modules if ref() is not None] == []
        assert sum(ref() is not None for ref in weights) == 0
        assert card.used == 0
    finally:
        gc.enable()


def test_a_placement_that_is_gone_leaves_its_module_usable():
    card = Card()
    model, placement = layers(card, 0)
    x = torch.ones(1, 16)
    expected = model(x)
    placement.evict()
    del placement
    gc.collect()
    for part in model.modules():  # what checks that weights are on the device
        part._forward_pre_hooks.clear()
    assert torch.equal(model(x), expected)
