"""Automatic plans: the best that fits by the data, exact in bytes, and never what is known to crawl."""

import itertools
import json
import random
import re

import pytest
import torch

from quant_core import (
    AutoPlanRequest,
    GenerateRequest,
    LoadRequest,
    QuantPlan,
    SourceError,
    SpecError,
    auto_plan,
    auto_plan_data,
    backends,
    estimate,
    expectation,
    expected_psnr,
    footprint,
    format_plan,
    load_pipeline,
    parse_plan,
    usable_specs,
)
from quant_core.__main__ import main
from quant_core.expectation import noise
from quant_core.knapsack import Choice, combine, front
from quant_core.layers import match_modules
from quant_core.metrics import error_of, psnr_of
from quant_core.sensitivity_data import parse_sensitivity, shipped

RUN = GenerateRequest("a lake", width=128, height=128, steps=2, max_sequence_length=48)
MIB = 2**20


def plan(mib, fits="weights", **others):
    return auto_plan(
        AutoPlanRequest(LoadRequest("demo", **others.pop("load", {})), RUN, int(mib * MIB), fits, **others)
    )


@pytest.mark.parametrize("mib", [25.5, 21.0, 18.0, 16.0, 14.0, 12.5])
def test_a_plan_fits_and_takes_what_was_said(mib):
    found = plan(mib)
    pipeline = load_pipeline(LoadRequest("demo", found.plan))
    assert sum(map(footprint, pipeline.models.values())) == found.footprint == found.taken <= mib * MIB
    assert found.taken > 0.9 * mib * MIB, "it leaves little of the budget"
    assert parse_plan(format_plan(found.plan)) == found.plan == QuantPlan.from_dict(found.plan.to_dict())


def test_more_room_never_makes_it_worse():
    errors = [plan(mib).expected_error for mib in (12.5, 14, 16, 18, 21, 25.5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_what_fits_in_16_bit_is_left_alone():
    found = plan(26)
    assert found.plan == QuantPlan() and found.reasons[2] == "It is 16 bit, which fits."


def test_what_is_expected_of_a_plan_adds_up_from_the_data():
    (data,) = shipped()
    groups = {(name, key): group for name, part in data.components.items() for key, group in part.groups.items()}

    def expected(text):
        return error_of(expected_psnr(LoadRequest("demo", parse_plan(text))))

    whole = sum(group.errors["gguf/Q4_0"] for group in groups.values())
    assert expected("gguf/Q4_0?skip=none") == pytest.approx(whole)
    output = groups["transformer", "output"].errors
    assert expected("gguf/Q4_0?skip=norm_out|proj_out") == pytest.approx(whole - output["gguf/Q4_0"])
    mixed = whole - output["gguf/Q4_0"] + output["gguf/Q8_0"]
    assert expected("gguf/Q4_0?skip=none&Q8_0=norm_out|proj_out") == pytest.approx(mixed)
    half = groups["transformer", "output"].parameters  # 512 rows of norm_out, 64 of proj_out
    assert expected("transformer=gguf/Q4_0?skip=*_blocks*|*embed*|norm_out") == pytest.approx(
        output["gguf/Q4_0"] * 64 * 256 / half
    )
    assert expected("none") == 0


@pytest.mark.parametrize("mib", [13, 16, 20])
def test_the_error_that_is_said_is_the_one_expected_of_the_plan(mib):
    found = plan(mib)
    assert expected_psnr(LoadRequest("demo", found.plan)) == pytest.approx(psnr_of(found.expected_error))


def test_the_data_decide_what_stays_in_16_bit():
    (data,) = shipped()
    changed = data.to_dict()
    for group, told in changed["components"]["transformer"]["groups"].items():
        told["errors"] = dict.fromkeys(told["errors"], 1.0 if group == "modulation" else 1e-9)
    found = plan(16, sensitivity=parse_sensitivity(json.dumps(changed)))
    spec = found.plan.components["transformer"]
    transformer = load_pipeline(LoadRequest("demo")).models["transformer"]
    assert "transformer_blocks.1.norm1.linear" in match_modules(transformer, spec.skip_modules)
    assert "transformer_blocks.1.ff.net.2" not in match_modules(transformer, spec.skip_modules)


def test_what_crawls_is_never_taken():
    avoided = {f"{name}/{scheme.name}" for name, one in backends().items() for scheme in one.schemes if scheme.avoid}
    assert {"torchao/int8dq", "torchao/int4wo", "quanto/int4"} <= avoided
    usable = {str(spec) for spec in usable_specs(LoadRequest("demo"))}
    assert usable and usable.isdisjoint(avoided)
    assert {"bitsandbytes_4bit/nf4", "gguf/Q8_0", "torchao/int8wo"} <= usable and "torchao/fp8dq" not in usable


@pytest.mark.parametrize("fits", ["in turn", "together"])
def test_what_computes_counts_where_it_has_to_fit(fits):
    load = LoadRequest("demo")
    plain = estimate(load, RUN)
    whole = plain.peak_in_turn if fits == "in turn" else plain.peak_resident
    assert plan(whole / MIB + 0.01, fits).plan == QuantPlan()
    found = plan(0.88 * whole / MIB, fits)
    again = estimate(LoadRequest("demo", found.plan), RUN)
    taken = again.peak_in_turn if fits == "in turn" else again.peak_resident
    assert taken == found.taken <= 0.88 * whole and found.plan != QuantPlan()


@pytest.mark.parametrize("fits", ["in turn", "together"])
@pytest.mark.parametrize("text", ["bitsandbytes_4bit/nf4", "gguf/Q4_1", "torchao/int8wo", "gguf/Q8_0"])
def test_no_uniform_plan_that_fits_is_expected_to_be_nearer(fits, text):
    """Schemes differ in what they compute with: a budget that is enough for one is not for another of its size."""
    run = GenerateRequest("a lake", width=64, height=64, steps=1, max_sequence_length=48)
    load = LoadRequest("demo", parse_plan(f"{text}?skip=none"))
    uniform = estimate(load, run)
    budget = uniform.peak_in_turn if fits == "in turn" else uniform.peak_resident
    found = auto_plan(AutoPlanRequest(LoadRequest("demo"), run, budget, fits))
    assert found.taken <= budget and psnr_of(found.expected_error) >= expected_psnr(load) - 1e-9
    psnr, rival = re.search(r"against ([\d.]+) dB of (.+), the best uniform", found.reasons[2]).groups()
    assert float(psnr) >= round(expected_psnr(load), 1)
    again = estimate(LoadRequest("demo", parse_plan(rival)), run)
    assert (again.peak_in_turn if fits == "in turn" else again.peak_resident) <= budget


def test_a_budget_below_everything_says_what_would_do():
    with pytest.raises(
        SpecError, match=r"No plan fits into 3.00 MiB of weights: the least that was found takes 1\d\.\d\d MiB"
    ):
        plan(3)


def test_a_component_that_no_plan_makes_smaller_is_named():
    vae = next(part for part in estimate(LoadRequest("demo"), RUN).components if part.name == "vae")
    with pytest.raises(SpecError, match=r"the least that was found takes [\d.]+ MiB in its vae; give that much"):
        plan((vae.footprint + vae.activations) / MIB - 0.01, "in turn")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fits": "somehow"}, "fits is 'somehow'; use one of"),
        ({"budget": 0}, "it takes at least 1"),
        ({"load": LoadRequest("demo", parse_plan("gguf/Q4_0"))}, "leave the plan out"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(SpecError, match=message):
        AutoPlanRequest(**{"load": LoadRequest("demo"), "run": RUN, "budget": 1, "fits": "weights"} | change)


def test_another_model_is_told_by_the_most_similar(tiny):
    run = GenerateRequest("a cat", width=16, height=16, steps=1)
    folder = str(tiny("sd3"))
    size = sum(part.footprint for part in estimate(LoadRequest(folder), run).components)
    found = auto_plan(AutoPlanRequest(LoadRequest(folder), run, int(0.75 * size), "weights"))
    assert found.footprint <= 0.75 * size and not found.is_own
    assert "another model, so only the order counts" in found.reasons[2] and "dB" not in found.reasons[2]
    assert sum(map(footprint, load_pipeline(LoadRequest(folder, found.plan)).models.values())) == found.footprint


def test_a_pipeline_that_is_quantized_already_has_nothing_to_choose(tmp_path):
    from quant_core import save_pipeline

    save_pipeline(load_pipeline(LoadRequest("demo", parse_plan("torchao/int8wo"))), tmp_path / "saved")
    with pytest.raises(SpecError, match="no component that could be quantized"):
        auto_plan(AutoPlanRequest(LoadRequest(str(tmp_path / "saved")), RUN, 10 * MIB))


def told(**errors):
    """The shipped data with other errors for the transformer's groups, None for none at all."""
    (data,) = shipped()
    changed = data.to_dict()
    for name, group in changed["components"]["transformer"]["groups"].items():
        group["errors"] = errors.get(name.replace(" ", "_").replace("-", "_"), group["errors"])
    return parse_sensitivity(json.dumps(changed))


def test_a_group_that_was_not_measured_counts_as_the_worst_one():
    (data,) = shipped()
    groups = data.components["transformer"].groups
    alone = LoadRequest("demo", parse_plan("transformer=gguf/Q4_0?skip=*_blocks*|*embed*"))
    worst = max(group.errors["gguf/Q4_0"] for name, group in groups.items() if name != "output")
    assert expected_psnr(alone, told(output={})) == pytest.approx(psnr_of(worst))


def test_a_scheme_that_was_not_measured_counts_by_its_noise():
    (data,) = shipped()
    errors = data.components["transformer"].groups["output"].errors
    alone = LoadRequest("demo", parse_plan("transformer=gguf/Q4_0?skip=*_blocks*|*embed*"))
    levels = [noise(text, torch.bfloat16, torch.device("cpu")) for text in ("gguf/Q4_0", "gguf/Q4_1", "gguf/Q8_0")]
    given = {text: errors[text] for text in ("gguf/Q4_1", "gguf/Q8_0")}  # of which Q4_1 is the nearer
    assert expected_psnr(alone, told(output=given)) == pytest.approx(
        psnr_of(errors["gguf/Q4_1"] * levels[0] / levels[1])
    )


def test_a_backend_that_is_gone_is_no_measure(monkeypatch):
    (data,) = shipped()
    error = data.components["transformer"].groups["output"].errors["torchao/int8wo"]
    monkeypatch.setattr(expectation, "_runs", lambda spec, *where: not spec.startswith("torchao"))
    alone = LoadRequest("demo", parse_plan("transformer=gguf/Q4_0?skip=*_blocks*|*embed*"))
    assert expected_psnr(alone, told(output={"torchao/int8wo": error})) == pytest.approx(psnr_of(error))


def test_data_without_an_error_are_refused():
    (data,) = shipped()
    empty = data.to_dict() | {"components": {}}
    with pytest.raises(SourceError, match="have no error of any group"):
        plan(15, sensitivity=parse_sensitivity(json.dumps(empty)))


def test_the_knapsack_is_that_of_trying_everything():
    rng = random.Random(0)
    items = [[Choice(rng.randrange(50), rng.random(), (f"{item}{way}",)) for way in range(4)] for item in range(5)]
    sums = [
        Choice(
            sum(pick.bytes for pick in picks),
            sum(pick.error for pick in picks),
            sum((pick.picks for pick in picks), ()),
        )
        for picks in itertools.product(*items)
    ]
    tried = front(sums)
    assert [(way.bytes, pytest.approx(way.error)) for way in combine(items)] == [
        (way.bytes, way.error) for way in tried
    ]


def test_a_long_front_is_thinned_but_keeps_its_ends():
    rng = random.Random(0)
    items = [[Choice(size, 1 / (1 + size), (size,)) for size in rng.sample(range(10**6), 60)] for _ in range(4)]
    found = combine(items)
    assert len(found) <= 3002
    assert found[0].bytes == sum(min(way.bytes for way in item) for item in items)
    assert found[-1].error == pytest.approx(sum(min(way.error for way in item) for item in items))


def test_noise_orders_schemes_by_their_bits():
    levels = [
        noise(text, torch.float32, torch.device("cpu"))
        for text in ("gguf/Q8_0", "gguf/Q5_0", "gguf/Q4_0", "bitsandbytes_4bit/fp4")
    ]
    assert levels == sorted(levels) and levels[0] < levels[-1] / 50


def test_the_reasons_name_size_choice_and_cost():
    found = plan(15)
    size, choice, cost = found.reasons
    assert "of 15.00 MiB of weights" in size and "% of 16 bit" in size
    assert all(f"{name}: " in choice for name in ("transformer", "text_encoder", "text_encoder_2"))
    assert f"{psnr_of(found.expected_error):.1f} dB" in cost and "measured on demo" in cost
    data = auto_plan_data(found)
    assert QuantPlan.from_dict(data["plan"]) == parse_plan(data["text"]) == found.plan
    assert json.loads(json.dumps(data))["measured_on_this_model"]


def test_the_command_prints_a_plan_that_loads(tmp_path, capsys):
    out = tmp_path / "plan.json"
    size = ["--width", "64", "--height", "64"]
    assert main(["plan", "demo", "--budget", "15MiB", "--fits", "weights", *size, "--out", str(out)]) == 0
    text, *reasons = capsys.readouterr().out.strip().splitlines()
    assert len(reasons) == 3 and parse_plan(text) == QuantPlan.from_dict(json.loads(out.read_text()))
    assert main(["inspect", "demo", "--plan", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "8"], "has no unit"),
        (["--budget", "1MiB", "--fits", "weights"], "No plan fits into 1.00 MiB"),
        (["--budget", "8GiB", "--sensitivity", "none.json"], "none.json cannot be read"),
        (["--budget", "8GiB", "--out", "plan.txt"], "--out is plan.txt; name a .json file"),
    ],
)
def test_the_command_refuses_what_it_cannot_do(arguments, message, capsys):
    assert main(["plan", "demo", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
