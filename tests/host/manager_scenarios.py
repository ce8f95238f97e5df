"""What ComfyUI's own memory manager does to our pipelines on a device of a given size.

Run by ComfyUI's Python in ComfyUI's folder: manager_scenarios.py ROOT FOLDER. Prints what was seen, as JSON.

The device is the CPU under another name (`cpu:0`), so that all computes for real; copies to it are counted, and
ComfyUI's question for free memory is answered from the count.
"""

import contextlib
import gc
import importlib.util
import io
import json
import logging
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import torch

ROOT, FOLDER = Path(sys.argv[1]), Path(sys.argv[2])
sys.argv = sys.argv[:1] + ["--cpu"]
sys.path.insert(0, ".")
import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import comfy.model_management as mm  # noqa: E402
import comfy.model_patcher  # noqa: E402

spec = importlib.util.spec_from_file_location("quant_pack", ROOT / "__init__.py")
pack = sys.modules["quant_pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from quant_pack.nodes import comfy_memory  # noqa: E402
from quant_pack.nodes.comfy_memory import ManagedPipeline  # noqa: E402
from quant_pack.quant_core import (  # noqa: E402
    GenerateRequest,
    LoadRequest,
    activations,
    generate,
    lane,  # noqa: E402
    load_pipeline,
    parse_plan,
)

torch.set_num_threads(1)
CARD, MIB = torch.device("cpu", 0), 2**20
PLAN = "transformer=torchao/int8wo,text_encoder_2=bitsandbytes_4bit/nf4"
REQUEST = GenerateRequest("a lake", width=64, height=64, steps=3, seed=3)


class Card:
    """The memory of the device."""

    def __init__(self):
        self.total = 0
        self.used = self.peak = self.copied = 0
        self.fails_after = None
        self.fails_in_background = False
        self.lock = threading.RLock()

    def copy(self, tensor):
        if self.fails_in_background and threading.current_thread() is not threading.main_thread():
            raise torch.OutOfMemoryError("the device is full")
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise torch.OutOfMemoryError("the device is full")
        made, size = tensor.clone(), tensor.numel() * tensor.element_size()
        with self.lock:
            self.used, self.copied = self.used + size, self.copied + 1
            self.peak = max(self.peak, self.used)
        weakref.finalize(made.untyped_storage(), self._gone, size)
        return made

    def _gone(self, size):
        with self.lock:
            self.used -= size

    def free(self, device=None, torch_free_too=False):
        foreign = sum(
            entry.model.loaded_size()
            for entry in mm.current_loaded_models
            if entry.model is not None and type(entry.model) is comfy.model_patcher.ModelPatcher
        )
        left = self.total - self.used - foreign
        return (left, 0) if torch_free_too else left


card = Card()
lane.Lane.copy = lambda _, tensor: card.copy(tensor)
mm.get_free_memory = card.free
mm.get_torch_device = lambda: CARD
mm.get_all_torch_devices = lambda exclude_current=False: [CARD]
mm.is_device_cpu = lambda device: device == torch.device("cpu")
comfy_memory.can_look_ahead = lambda device: mm.vram_state == mm.VRAMState.NORMAL_VRAM
mm.vram_state = mm.VRAMState.NORMAL_VRAM
mm.lowvram_available = True
BASE = mm.minimum_inference_memory()


def pipeline(plan=PLAN):
    return ManagedPipeline(load_pipeline(LoadRequest(str(FOLDER), parse_plan(plan))))


def resident(managed):
    return {name: placement.resident for name, placement in managed.placements.items()}


def sizes(managed):
    return {name: placement.size for name, placement in managed.placements.items()}


def listed():
    return [type(entry.model.model).__name__ for entry in mm.current_loaded_models if entry.model is not None]


def fits(managed, name, part=1.0):
    """A card on which ComfyUI finds room for a part of a component, beside what it keeps for computing."""
    card.total = BASE + managed.placements[name].size * part * 1.1 + MIB / 4


@contextlib.contextmanager
def state(value):
    mm.vram_state = value
    try:
        yield
    finally:
        mm.vram_state = mm.VRAMState.NORMAL_VRAM


def watch(managed):
    """Note what is where each time a component is used."""
    seen, prepare = [], managed.prepare

    def noting(name):
        prepare(name)
        seen.append((name, resident(managed)))

    managed.prepare = noting
    return seen


def room_for_all():
    managed = pipeline()
    card.total = BASE + 10 * sum(sizes(managed).values())
    images = generate(managed, REQUEST)
    seen = {"resident": resident(managed), "sizes": sizes(managed), "used": card.used, "listed": listed()}
    mm.unload_all_models()
    return seen | {"after free": card.used, "left": resident(managed), "listed after": listed()}, images


def room_for_one(images):
    managed = pipeline()
    fits(managed, "transformer")
    seen = watch(managed)
    same = torch.equal(generate(managed, REQUEST), images)
    return {"seen": seen, "sizes": sizes(managed), "same": same, "least": managed.placements["transformer"].least}


def room_for_a_part(images):
    managed = pipeline()
    transformer = managed.placements["transformer"]
    fits(managed, "transformer", 0.8)
    seen = watch(managed)
    card.peak = card.used
    same = torch.equal(generate(managed, REQUEST), images)
    during = max(there["transformer"] for name, there in seen if name == "transformer")
    answer = {"same": same, "during": during, "size": transformer.size, "least": transformer.least}
    answer |= {"peak": card.peak, "room": card.total - BASE, "used": card.used, "resident": resident(managed)}
    patcher = managed.patchers["transformer"]
    card.total = BASE * 2
    mm.load_models_gpu([patcher])
    before = transformer.resident
    answer["unloaded"] = patcher.partially_unload(torch.device("cpu"), MIB)
    answer["fell by"] = before - transformer.resident
    before = transformer.resident
    answer["negative"] = patcher.partially_load(CARD, -MIB)
    answer["fell again by"] = before - transformer.resident
    answer["loaded size"] = patcher.loaded_size()
    answer["resident"] = transformer.resident
    answer["never"] = patcher.partially_load(CARD, -(10**12))
    answer["still there"] = transformer.resident
    return answer


def novram(images):
    with state(mm.VRAMState.NO_VRAM):
        managed = pipeline()
        card.total = BASE * 2
        same = torch.equal(generate(managed, REQUEST), images)
        transformer = managed.placements["transformer"]
        return {"same": same, "resident": transformer.resident, "size": transformer.size}


def highvram(images):
    offload, mm.unet_offload_device = mm.unet_offload_device, lambda: CARD
    try:
        with state(mm.VRAMState.HIGH_VRAM):
            managed = pipeline()
            card.total = BASE * 2
            same = torch.equal(generate(managed, REQUEST), images)
            return {"same": same, "resident": resident(managed), "sizes": sizes(managed)}
    finally:
        mm.unet_offload_device = offload


def load_fails_half_way(images):
    managed = pipeline()
    card.total = BASE * 2
    patcher = managed.patchers["transformer"]
    mm.load_models_gpu([managed.patchers["vae"]])
    before, answer = card.used, {}
    card.fails_after = 40
    try:
        mm.load_models_gpu([patcher])
    except torch.OutOfMemoryError as error:
        answer["raised"] = type(error).__name__
    answer |= {"grew": card.used - before, "resident": patcher.loaded_size(), "listed": listed()}
    card.fails_after = 100
    try:
        generate(managed, REQUEST)
    except torch.OutOfMemoryError as error:
        answer["while it runs"] = type(error).__name__
    card.fails_after = None
    answer["used as listed"] = card.used == sum(resident(managed).values())
    mm.unload_all_models()
    answer["after free"] = card.used
    answer["same"] = torch.equal(generate(managed, REQUEST), images)
    return answer


def streaming_fails(images):
    managed = pipeline()
    with state(mm.VRAMState.NO_VRAM):
        card.total = BASE * 2
        generate(managed, REQUEST)
        copied = card.copied
        generate(managed, REQUEST)
        card.fails_after = (card.copied - copied) // 2
        answer = {}
        try:
            generate(managed, REQUEST)
        except torch.OutOfMemoryError as error:
            answer["raised"] = type(error).__name__
        card.fails_after = None
        answer["used as listed"] = card.used == sum(resident(managed).values())
        answer["same"] = torch.equal(generate(managed, REQUEST), images)
    return answer


def cancelled_between_blocks(images):
    managed = pipeline()
    with state(mm.VRAMState.NO_VRAM):
        card.total = BASE * 2
        transformer = managed.placements["transformer"]
        checks, check = [], transformer.check

        def cancel():
            checks.append(card.used)
            if len(checks) == 5:
                mm.interrupt_current_processing()
            check()

        transformer.check = cancel
        answer = {}
        try:
            generate(managed, REQUEST)
        except mm.InterruptProcessingException:
            answer["stopped after blocks"] = len(checks)
        transformer.check = check
        answer["used as listed"] = card.used == sum(resident(managed).values())
        answer["same"] = torch.equal(generate(managed, REQUEST), images)
    return answer


def foreign_model(images):
    """One of ComfyUI's own patchers beside ours."""
    managed = pipeline()
    layers = torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(6)))  # 6 MiB
    foreign = comfy.model_patcher.ModelPatcher(layers, CARD, torch.device("cpu"))
    card.total = BASE + 12 * MIB
    generate(managed, REQUEST)
    answer = {"ours at first": sum(resident(managed).values())}
    mm.load_models_gpu([foreign])
    answer["foreign loaded"] = foreign.loaded_size() == foreign.model_size()
    answer["ours beside it"] = sum(resident(managed).values())
    answer["within"] = card.total - card.free() <= card.total
    card.total = BASE + managed.placements["transformer"].size * 1.1 + MIB / 4
    answer["same"] = torch.equal(generate(managed, REQUEST), images)
    answer["foreign after ours"] = foreign.loaded_size()
    return answer


def seed_only(images):
    managed = pipeline()
    fits(managed, "transformer")
    forwards = []
    for name in managed.index.text_encoders:
        for part in list(managed.models[name].modules())[1:]:
            part.register_forward_hook(lambda *_: forwards.append(1))
    generate(managed, REQUEST)
    first, seen = len(forwards), watch(managed)
    evictions = {name: managed.placements[name].evictions for name in managed.index.text_encoders}
    other = GenerateRequest("a lake", width=64, height=64, steps=3, seed=4)
    remembered = generate(managed, other)
    answer = {"first": first, "again": len(forwards) - first, "prepared": sorted({name for name, _ in seen})}
    answer["moved"] = any(
        managed.placements[name].evictions != count or managed.placements[name].resident
        for name, count in evictions.items()
    )
    switched_off = GenerateRequest("a lake", width=64, height=64, steps=3, seed=4, remember=False)
    answer["same"] = torch.equal(generate(managed, switched_off), remembered)
    answer["switched off"] = len(forwards) - first
    return answer


def asks_for_what_it_needs(images):
    managed = pipeline()
    card.total = BASE * 2
    asked, load = {}, mm.load_models_gpu

    def noting(patchers, memory_required=0, **further):
        asked.setdefault(patchers[0].name, []).append(memory_required)
        load(patchers, memory_required=memory_required, **further)

    mm.load_models_gpu = noting
    try:
        generate(managed, REQUEST)
        generate(managed, replace(REQUEST, width=128, height=128, seed=9))
        generate(managed, replace(REQUEST, prompt="a lake at noon", seed=10))
    finally:
        mm.load_models_gpu = load
    return {"asked": asked, "expected": activations(managed, REQUEST, "cpu"), "looked at": len(managed.needs)}


def dropped(images):
    """Without the garbage collector."""
    managed = pipeline()
    fits(managed, "transformer")
    generate(managed, REQUEST)
    watched = [weakref.ref(module) for module in managed.models.values()]
    gc.collect()
    gc.disable()
    try:
        del managed
        mm.cleanup_models_gc()
        return {"alive": sum(ref() is not None for ref in watched), "used": card.used, "listed": listed()}
    finally:
        gc.enable()


def while_it_encodes(managed, request):
    """Run, and say what the transformer's weights did when the last text encoder was about to end."""
    transformer, seen = managed.placements["transformer"], []

    def look(*_):
        if transformer.is_ahead:
            transformer._ahead._thread.join()
        seen[:] = [(transformer.is_ahead, card.used - sum(resident(managed).values()), resident(managed))]

    hook = list(managed.models["text_encoder_2"].modules())[-1].register_forward_hook(look)
    try:
        return seen, generate(managed, request)
    finally:
        hook.remove()


def weights_come_ahead(images):
    """With room for all: three encoders' ends, of a first run, of another prompt and of one that it has seen."""
    managed, loads, load = pipeline(), [], mm.load_models_gpu

    def noting(patchers, **further):
        before = [patcher.loaded_size() for patcher in patchers]
        load(patchers, **further)
        loads.append((patchers[0].name, before[0], patchers[0].loaded_size(), listed()))

    card.total = BASE + 10 * sum(sizes(managed).values())
    mm.load_models_gpu = noting
    try:
        seen, found = while_it_encodes(managed, REQUEST)
        answer = {"same": torch.equal(found, images), "seen": seen, "loads": list(loads), "sizes": sizes(managed)}
        mm.unload_all_models()
        again, other = while_it_encodes(managed, replace(REQUEST, seed=4))
        answer |= {"remembered": len(again), "other": torch.equal(other, found)}
        answer |= {"used as listed": card.used == sum(resident(managed).values())}
    finally:
        mm.load_models_gpu = load
    return answer


def no_room_ahead(images):
    managed = pipeline()
    fits(managed, "transformer")
    seen, found = while_it_encodes(managed, REQUEST)
    with state(mm.VRAMState.NO_VRAM):
        card.total = BASE + 10 * sum(sizes(managed).values())
        mm.unload_all_models()
        novram, other = while_it_encodes(managed, replace(REQUEST, remember=False))
    return {"same": torch.equal(found, images) and torch.equal(other, images), "seen": seen, "novram": novram}


def encoders_that_are_done_make_room(images):
    """Room for the last text encoder beside the transformer, but not for the first."""
    managed, all_sizes = pipeline(), sizes(pipeline())
    request = replace(REQUEST, remember=False)
    used = activations(managed, request, "cpu")
    card.total = BASE + all_sizes["text_encoder_2"] + 1.1 * all_sizes["transformer"] + MIB / 2
    card.total += used["transformer"] + used["text_encoder_2"]
    first, found = while_it_encodes(managed, request)
    mm.unload_all_models()
    second, other = while_it_encodes(managed, request)
    return {
        "same": torch.equal(found, images) and torch.equal(other, images),
        "first": first,
        "second": second,
        "sizes": all_sizes,
        "used as listed": card.used == sum(resident(managed).values()),
    }


def ahead_fails(images):
    """In the background; and where the text encoder is cancelled meanwhile, and where ComfyUI's manager fails."""
    managed, answer = pipeline(), {}
    card.total = BASE + 10 * sum(sizes(managed).values())
    request = replace(REQUEST, remember=False)
    card.fails_in_background = True
    seen, found = while_it_encodes(managed, request)
    card.fails_in_background = False
    answer |= {"seen": seen, "same": torch.equal(found, images)}
    mm.unload_all_models()
    encoder, check = managed.placements["text_encoder_2"], managed.placements["text_encoder_2"].check
    encoder.check = lambda: mm.interrupt_current_processing() or check()
    try:
        generate(managed, request)
    except mm.InterruptProcessingException:
        answer["cancelled"] = sorted(name for name, size in resident(managed).items() if size)
    encoder.check = check
    answer["used as listed"] = card.used == sum(resident(managed).values())
    load = mm.load_models_gpu

    def failing(patchers, **further):
        if patchers[0].name == "transformer":
            answer["had arrived"] = patchers[0].loaded_size()
            raise torch.OutOfMemoryError("the device is full")
        load(patchers, **further)

    mm.load_models_gpu = failing
    try:
        generate(managed, request)
    except torch.OutOfMemoryError as error:
        answer["raised"] = type(error).__name__
    finally:
        mm.load_models_gpu = load
    answer["size"], answer["left"] = sizes(managed)["transformer"], resident(managed)["transformer"]
    answer["same at last"] = torch.equal(generate(managed, request), images)
    return answer


def decoded_in_tiles(images):
    """The VAE's room is less than what it needs as a whole."""
    managed, asked, load = pipeline(), [], mm.load_models_gpu
    card.total = BASE * 2
    large = replace(REQUEST, width=256, height=256)
    whole = activations(managed, large, "cpu")["vae"]
    answer = {"room": managed.room, "device": int(mm.get_total_memory(CARD) - mm.extra_reserved_memory())}
    expected = generate(managed, large)
    managed.room = int(sizes(managed)["vae"] + whole * 0.6)

    def noting(patchers, memory_required=0, **further):
        asked.append((patchers[0].name, memory_required))
        load(patchers, memory_required=memory_required, **further)

    mm.load_models_gpu = noting
    try:
        found = generate(managed, large)
    finally:
        mm.load_models_gpu = load
    answer |= {"whole": whole, "asked": dict(asked)["vae"], "differs": not torch.equal(found, expected)}
    answer |= {"small": torch.equal(generate(managed, REQUEST), images), "tiling": managed.pipe.vae.use_tiling}
    return answer


SCENARIOS = (
    weights_come_ahead,
    no_room_ahead,
    encoders_that_are_done_make_room,
    ahead_fails,
    decoded_in_tiles,
    room_for_one,
    room_for_a_part,
    novram,
    highvram,
    load_fails_half_way,
    streaming_fails,
    cancelled_between_blocks,
    foreign_model,
    seed_only,
    asks_for_what_it_needs,
    dropped,
)


def main():
    log = io.StringIO()
    logging.getLogger().setLevel(logging.INFO)
    logging.getLogger().addHandler(logging.StreamHandler(log))
    with torch.inference_mode():
        answers = {}
        answers["room_for_all"], images = room_for_all()
        for scenario in SCENARIOS:
            gc.collect()
            assert card.used == 0 and not listed(), scenario.__name__
            answers[scenario.__name__] = scenario(images)
            mm.unload_all_models()
    answers["log"] = log.getvalue()
    print("\n" + json.dumps(answers))


main()
