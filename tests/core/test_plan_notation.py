"""A plan as a line of text and as JSON: what is written is read back, and what means nothing is told so."""

import json

import pytest

from quant_core import QuantPlan, QuantSpec, SpecError, backends, format_plan, parse_plan

INT8 = QuantSpec("torchao", "int8wo")
NF4 = QuantSpec("bitsandbytes_4bit", "nf4")

PLANS = [
    (QuantPlan(), "none", "none"),
    (QuantPlan(default=INT8), "torchao/int8wo", "global"),
    (QuantPlan({"transformer": INT8}), "transformer=torchao/int8wo", "granular"),
    (QuantPlan({"unet": INT8}, NF4), "unet=torchao/int8wo,default=bitsandbytes_4bit/nf4", "granular"),
    (
        QuantPlan({"transformer": QuantSpec("torchao", "int4wo", {"group_size": "64"})}),
        "transformer=torchao/int4wo?group_size=64",
        "granular",
    ),
    (
        QuantPlan(default=QuantSpec("bitsandbytes_4bit", "fp4", {"double_quant": True, "compute_dtype": "float32"})),
        "bitsandbytes_4bit/fp4?double_quant=true&compute_dtype=float32",
        "global",
    ),
    (
        QuantPlan(default=QuantSpec("bitsandbytes_8bit", "int8", {"threshold": 3})),
        "bitsandbytes_8bit/int8?threshold=3.0",
        "global",
    ),
    (
        QuantPlan(default=QuantSpec("quanto", "int8", skip_modules=("proj_out", "**.to_[qk]", "blocks.?.*"))),
        "quanto/int8?skip=proj_out|**.to_[qk]|blocks.?.*",
        "global",
    ),
    (
        QuantPlan(default=QuantSpec("quanto", "int8", skip_modules=("a,b", "c|d", "e&f=g", "h+i %2C j"))),
        "quanto/int8?skip=a%2Cb|c%7Cd|e%26f%3Dg|h%2Bi%20%252C%20j",
        "global",
    ),
    (
        QuantPlan({"transformer": QuantSpec("gguf", "file", {"path": "/models/a b, c (1)&d=e+f%g.gguf"})}),
        "transformer=gguf/file?path=/models/a%20b%2C%20c%20%281%29%26d%3De%2Bf%25g.gguf",
        "granular",
    ),
    (
        QuantPlan({"unet": QuantSpec("gguf", "file", {"path": "C:\\Modelle\\größe.gguf"}, ("time_embedding",))}, INT8),
        "unet=gguf/file?path=C:%5CModelle%5Cgr%C3%B6%C3%9Fe.gguf&skip=time_embedding,default=torchao/int8wo",
        "granular",
    ),
]


@pytest.mark.parametrize(("plan", "text", "mode"), PLANS, ids=[text[:40] for _, text, _ in PLANS])
def test_a_plan_is_read_back_as_it_was_written(plan, text, mode):
    assert plan.mode == mode
    assert format_plan(plan) == text
    assert parse_plan(text) == plan
    assert hash(parse_plan(text)) == hash(plan)
    assert parse_plan(json.dumps(plan.to_dict(), indent=2)) == plan
    assert QuantPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("", "none"),
        (" none\n", "none"),
        ("{}", "none"),
        ("default=torchao/int8wo", "torchao/int8wo"),
        (" unet = torchao/int8wo ,\n default = quanto/int8 ,", "unet=torchao/int8wo,default=quanto/int8"),
        ("gguf/file?path=/a b/c d.gguf", "gguf/file?path=/a%20b/c%20d.gguf"),
        ("quanto/int8?skip=a&skip=b|c", "quanto/int8?skip=a|b|c"),
        ("quanto/int8?skip=%6eone", "quanto/int8?skip=none"),
        ("bitsandbytes_8bit/int8?threshold=6", "bitsandbytes_8bit/int8"),
        ("torchao/int4wo?group_size=auto", "torchao/int4wo"),
        ('{"default": {"backend": "quanto", "scheme": "int8", "skip_modules": "a"}}', "quanto/int8?skip=a"),
        ('{"default": {"backend": "bitsandbytes_8bit", "scheme": "int8", "options": {"threshold": 2}}}',)
        + ("bitsandbytes_8bit/int8?threshold=2",),
    ],
)
def test_other_ways_to_write_the_same_plan(text, same_as):
    assert parse_plan(text) == parse_plan(same_as)


@pytest.mark.parametrize("backend", backends().values(), ids=backends())
def test_every_scheme_can_be_written_with_every_value_of_its_options(backend):
    for scheme in backend.schemes:
        for option in backend.options:
            if option.schemes and scheme.name not in option.schemes:
                continue
            values = option.choices or ({True, False} if option.default in (True, False) else {option.default})
            for value in values:
                plan = QuantPlan(default=QuantSpec(backend.name, scheme.name, {option.name: value}))
                assert parse_plan(format_plan(plan)) == plan
                assert plan.default.options == backend.complete(scheme.name, {}) | {option.name: value}


NO_PART = "is no part of a plan; write component=backend/scheme, or backend/scheme for all."
BACKENDS = "bitsandbytes_4bit, bitsandbytes_8bit, gguf, quanto, torchao"
SPEC = '{"default": {"backend": "quanto", "scheme": "int8", %s}}'
WRONG = [
    ("torchao", f"'torchao' {NO_PART}"),
    ("torchao/", f"'torchao/' {NO_PART}"),
    ("unet=none", f"'unet=none' {NO_PART}"),
    ("[]", f"'[]' {NO_PART}"),
    ("gguf/file?path=/a,b.gguf", f"'b.gguf' {NO_PART}"),
    ("bnb/nf4", f"Unknown backend 'bnb'; use one of: {BACKENDS}."),
    ("torcha/int8wo", f"Unknown backend 'torcha' (did you mean 'torchao'?); use one of: {BACKENDS}."),
    ("quanto/int3", "quanto has no scheme 'int3'; use one of: float8, int2, int4, int8."),
    ("torchao/int4wo?group_size=7", "group_size is '7'; use one of: auto, 32, 64, 128, 256."),
    ("torchao/fp8wo?group_size=64", "group_size has no effect on torchao/fp8wo; it belongs to: int4wo, int8wo."),
    ("quanto/int8?group=1", "quanto has no option 'group'; it takes: none."),
    (
        "torchao/int4wo?grup_size=64",
        "torchao has no option 'grup_size' (did you mean 'group_size'?); it takes: group_size, packing.",
    ),
    ("bitsandbytes_4bit/nf4?double_quant", "'double_quant' is no option; write name=value."),
    ("bitsandbytes_4bit/nf4?double_quant=yes", "double_quant is 'yes'; write true or false."),
    ("bitsandbytes_8bit/int8?threshold=high", "threshold is 'high'; it takes a number."),
    ("bitsandbytes_8bit/int8?threshold=-1", "threshold is -1.0; it must be within 0.0 and 1000.0."),
    ("bitsandbytes_8bit/int8?threshold=nan", "threshold is 'nan'; it takes a number."),
    ("bitsandbytes_8bit/int8?threshold=1_0", "threshold is '1_0'; it takes a number."),
    ("bitsandbytes_8bit/int8?threshold=\u0663", "threshold is '\u0663'; it takes a number."),
    (
        "bitsandbytes_8bit/int8?threshold=1&threshold=2",
        "'bitsandbytes_8bit/int8?threshold=1&threshold=2' gives threshold twice; give it once.",
    ),
    ("quanto/int8?skip=", "'' is no skip pattern; write a module's name or a glob of it."),
    ("quanto/int8?skip=a||b", "'' is no skip pattern; write a module's name or a glob of it."),
    ("quanto/int8,torchao/int8wo", "The plan names default twice; name it once."),
    ("unet=quanto/int8,unet=quanto/int8", "The plan names unet twice; name it once."),
    (
        "a=quanto/int8;b=quanto/int8",
        "'a=quanto/int8;b' is no name of a component; a plan names one, as transformer.",
    ),
    ("{", "The plan is no valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
    ('{"plan": 1}', "A plan is an object with components and default, and nothing else."),
    ('{"components": [1]}', "A plan's components are an object: component name to spec."),
    ('{"components": {"unet": null}}', "A spec is None; write an object with backend and scheme."),
    ('{"default": {"backend": "quanto"}}', "A spec needs both backend and scheme, by name."),
    ('{"default": {"backend": ["quanto"], "scheme": 8}}', "A spec needs both backend and scheme, by name."),
    (SPEC % '"bits": 8', "A spec has no bits; it has backend, scheme, options, skip_modules, mixed."),
    (SPEC % '"options": [1]', "options are [1]; write an object: name to value."),
    (SPEC % '"skip_modules": 5', "skip_modules are 5; write a list of patterns."),
    (SPEC % '"options": ""', "options are ''; write an object: name to value."),
    (SPEC % '"skip_modules": false', "skip_modules are False; write a list of patterns."),
    (SPEC % '"mixed": 0', "mixed is 0; write an object: module pattern to scheme."),
    (SPEC % '"scheme": "int4"', "The plan gives 'scheme' twice; give it once."),
    ('{"components": 0}', "A plan's components are an object: component name to spec."),
    ('{"components": []}', "A plan's components are an object: component name to spec."),
    ('{"default": false}', "A spec is False; write an object with backend and scheme."),
    ('{"default": null, "default": null}', "The plan gives 'default' twice; give it once."),
    (SPEC % '"skip_modules": [5]', "5 is no skip pattern; write a module's name or a glob of it."),
]


@pytest.mark.parametrize(("text", "sentence"), WRONG, ids=[text[:40] for text, _ in WRONG])
def test_a_wrong_plan_is_told_what_would_be_right(text, sentence):
    with pytest.raises(SpecError) as error:
        parse_plan(text)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "make",
    [
        lambda: QuantPlan(default="torchao/int8wo"),
        lambda: QuantPlan({"unet": "torchao/int8wo"}),
        lambda: QuantPlan({"default": INT8}),
        lambda: QuantPlan({"../unet": INT8}),
        lambda: QuantSpec("bitsandbytes_8bit", "int8", {"threshold": True}),
        lambda: QuantSpec("bitsandbytes_4bit", "nf4", {"double_quant": 1}),
        lambda: QuantSpec("bitsandbytes_8bit", "int8", {"threshold": 10**400}),
        lambda: QuantSpec("quanto", "int8", options=0),
        lambda: QuantSpec("quanto", "int8", skip_modules=0),
    ],
)
def test_a_plan_made_in_python_is_checked_when_it_is_made(make):
    with pytest.raises(SpecError):
        make()


def test_a_plan_does_not_change_with_what_it_was_made_from():
    options, components = {"threshold": 3.0}, {}
    spec = QuantSpec("bitsandbytes_8bit", "int8", options)
    components["unet"] = spec
    plan = QuantPlan(components)
    options["threshold"] = 5.0
    components.clear()
    assert plan.components["unet"].options == {"threshold": 3.0}
    with pytest.raises(TypeError):
        plan.components["vae"] = spec
