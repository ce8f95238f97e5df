"""ComfyUI's own memory manager over our pipelines, on a device of a given size: manager_scenarios.py says how."""

import json
import os
import subprocess

import pytest

from .conftest import COMFYUI, PYTHON, ROOT

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(not (COMFYUI / "main.py").is_file() or not PYTHON.exists(), reason="no ComfyUI"),
]
MIB = 2**20


@pytest.fixture(scope="module")
def seen():
    """What each scenario saw."""
    command = [
        str(PYTHON),
        str(ROOT / "tests/host/manager_scenarios.py"),
        str(ROOT),
        str(ROOT / "demo_model/pipeline"),
    ]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "QUANTIZED_DIFFUSERS_STORE": "off"}
    done = subprocess.run(command, cwd=COMFYUI, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_with_room_for_all_all_stay_and_are_given_back(seen):
    case = seen["room_for_all"]
    assert case["resident"] == case["sizes"]
    assert case["used"] == sum(case["sizes"].values())
    assert len(case["listed"]) == len(case["sizes"])
    assert case["after free"] == 0 and not any(case["left"].values()) and case["listed after"] == []


def test_text_encoders_make_room_for_the_denoiser_and_it_for_the_vae(seen):
    case = seen["room_for_one"]
    steps = [there for name, there in case["seen"] if name == "transformer"]
    assert all(there["transformer"] == case["sizes"]["transformer"] for there in steps)
    assert all(there["text_encoder"] == there["text_encoder_2"] == there["vae"] == 0 for there in steps)
    name, there = case["seen"][-1]
    assert (
        name == "vae" and there["vae"] == case["sizes"]["vae"] and there["transformer"] < case["sizes"]["transformer"]
    )
    assert case["same"]


def test_what_does_not_fit_is_streamed_within_the_room_and_with_the_same_bits(seen):
    case = seen["room_for_a_part"]
    assert 0 < case["during"] < case["size"]
    assert case["peak"] <= case["room"] < case["size"]
    assert case["same"]


def test_partial_loads_and_unloads_tell_the_truth(seen):
    case = seen["room_for_a_part"]
    assert case["unloaded"] == case["fell by"] >= MIB
    assert -case["negative"] == case["fell again by"] >= MIB
    assert case["loaded size"] == case["resident"] > 0
    assert 0 < case["still there"] < case["resident"] and -case["never"] == case["resident"] - case["still there"]


def test_novram_streams_all_blocks(seen):
    case = seen["novram"]
    assert case["same"] and 0 < case["resident"] < case["size"] / 2


def test_highvram_keeps_all_on_the_device(seen):
    case = seen["highvram"]
    assert case["same"] and case["resident"] == case["sizes"]


def test_a_load_that_runs_out_of_memory_leaves_nothing_and_works_the_next_time(seen):
    case = seen["load_fails_half_way"]
    assert case["raised"] == case["while it runs"] == "OutOfMemoryError"
    assert case["grew"] == case["resident"] == 0 and case["listed"] == ["AutoencoderKL"]
    assert case["used as listed"] and case["after free"] == 0 and case["same"]


@pytest.mark.parametrize("name", ["streaming_fails", "cancelled_between_blocks"])
def test_a_run_that_stops_within_a_step_leaves_only_what_is_listed(seen, name):
    case = seen[name]
    assert case.get("raised") == "OutOfMemoryError" or case.get("stopped after blocks") == 5
    assert case["used as listed"] and case["same"]


def test_foreign_models_and_ours_make_room_for_each_other(seen):
    case = seen["foreign_model"]
    assert case["foreign loaded"] and 0 <= case["ours beside it"] < case["ours at first"] and case["within"]
    assert case["same"] and case["foreign after ours"] == 0


def test_a_new_seed_neither_runs_nor_moves_a_text_encoder(seen):
    case = seen["seed_only"]
    assert case["first"] > 0 and case["again"] == 0 and not case["moved"]
    assert case["prepared"] == ["transformer", "vae"]
    assert case["same"] and case["switched off"] == case["first"]


def test_comfyui_is_asked_for_the_room_that_each_component_needs_beside_its_weights(seen):
    case = seen["asks_for_what_it_needs"]
    first = {name: asked[0] for name, asked in case["asked"].items()}
    assert first == case["expected"] and all(first.values())
    assert case["asked"]["vae"][1] > 3 * case["asked"]["vae"][0] == 3 * case["asked"]["vae"][2]
    assert case["looked at"] == 2  # sizes; neither the seed nor the words matter


def test_the_denoiser_s_weights_come_while_the_last_text_encoder_computes(seen):
    case = seen["weights_come_ahead"]
    size = case["sizes"]["transformer"]
    ((is_ahead, beyond, there),) = case["seen"]
    assert is_ahead and beyond == size and there["transformer"] == 0, "all copied, and none of it given over yet"
    ((before, after),) = [load[1:3] for load in case["loads"] if load[0] == "transformer"]
    assert before == after == size, "ComfyUI finds it there when it is asked"
    assert all(len(load[3]) == 1 + index for index, load in enumerate(case["loads"])), "nothing made room for it"
    assert case["same"] and case["used as listed"]
    assert case["remembered"] == 0 and not case["other"]


def test_weights_do_not_come_ahead_where_room_is_short_or_not_wanted(seen):
    case = seen["no_room_ahead"]
    assert [there[:2] for there in case["seen"] + case["novram"]] == [[False, 0]] * 2 and case["same"]


def test_text_encoders_that_are_done_make_room_for_weights_that_come_ahead(seen):
    """From the second run on, when it is known that they are not used again."""
    case = seen["encoders_that_are_done_make_room"]
    ((is_ahead, _, there),) = case["first"]
    assert not is_ahead and there["text_encoder"] == case["sizes"]["text_encoder"]
    ((is_ahead, beyond, there),) = case["second"]
    assert is_ahead and beyond == case["sizes"]["transformer"] and there["text_encoder"] == 0
    assert case["same"] and case["used as listed"]


def test_weights_that_fail_to_come_ahead_leave_nothing_and_harm_nobody(seen):
    case = seen["ahead_fails"]
    assert [there[:2] for there in case["seen"]] == [[True, 0]] and case["same"]
    assert case["cancelled"] == ["text_encoder", "text_encoder_2"] and case["used as listed"]
    assert case["raised"] == "OutOfMemoryError" and case["had arrived"] == case["size"] and case["left"] == 0
    assert case["same at last"]


def test_a_vae_without_room_works_in_tiles_and_asks_for_what_those_need(seen):
    case = seen["decoded_in_tiles"]
    assert case["room"] == case["device"] > 0
    assert 0 < case["asked"] < case["whole"] / 2 and case["differs"]
    assert case["small"] and not case["tiling"]


def test_a_dropped_pipeline_is_gone_without_the_garbage_collector(seen):
    assert seen["dropped"] == {"alive": 0, "used": 0, "listed": []}


def test_comfyui_saw_no_leak(seen):
    assert "Requested to load" in seen["log"] and "leak" not in seen["log"]
