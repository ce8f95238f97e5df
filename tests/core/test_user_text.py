"""What a user writes is taken as it was written, once, or refused."""

import json

import pytest

from quant_core import (
    GenerateRequest,
    LoadRequest,
    Optimization,
    QuantPlan,
    QuantSpec,
    SourceError,
    SpecError,
    parse_plan,
    parse_sensitivity,
    read_sensitivity,
)
from quant_core.__main__ import main
from quant_core.commands.arguments import plan_text
from quant_core.sensitivity_data import shipped
from quant_core.user_text import parse_json, parse_number, read_text

MARK = "\ufeff"
TWICE = [
    ('{"a": 1, "b": 2, "a": 3}', "a"),
    ('{"a": [{"b": {"c": 1, "c": 1}}]}', "c"),
    ('[{"": 1, "": null}]', ""),
]


@pytest.mark.parametrize(("text", "key"), TWICE)
def test_a_key_is_given_once_at_every_depth(text, key):
    with pytest.raises(SpecError) as error:
        parse_json("extra", text)
    assert str(error.value) == f"extra gives {key!r} twice; give it once."


LARGE = "extra has a whole number of more than 64 bits, which nothing here takes."
DEEP = "extra has lists or objects in one another too deep; a few levels are enough."
NO_JSON = [
    ("[" * 5000, DEEP),
    ('{"a":' * 5000 + "1" + "}" * 5000, DEEP),
    ("9" * 5000, LARGE),
    ('{"a": 18446744073709551616}', LARGE),
    ("-9223372036854775809", LARGE),
    ("[1e999]", "extra has 1e999, which is no finite number."),
    ("NaN", "extra has NaN, which is no finite number."),
    ("[-Infinity]", "extra has -Infinity, which is no finite number."),
    ("{", "extra is no valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)."),
    ("", "extra is no valid JSON: Expecting value: line 1 column 1 (char 0)."),
]


@pytest.mark.parametrize(("text", "sentence"), NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_or_no_number_that_anything_takes(text, sentence):
    with pytest.raises(SpecError) as error:
        parse_json("extra", text)
    assert str(error.value) == sentence


def test_half_a_character_is_refused():
    with pytest.raises(SpecError, match="extra is no valid JSON: .* surrogates not allowed"):
        parse_json("extra", '{"prompt_2": "a \\ud83d house"}')
    assert parse_json("extra", '"\\ud83d\\udc31"') == "\U0001f431"


def test_all_other_json_is_what_python_s_own_reader_makes_of_it():
    text = '{"a": [1, -0.5, 1e3, true, false, null, "b", {}, 18446744073709551615, -9223372036854775808]}'
    assert parse_json("extra", text) == parse_json("extra", MARK + text) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("7", int, 7),
        (" -7 ", int, -7),
        ("+7", float, 7.0),
        (".5", float, 0.5),
        ("5.", float, 5.0),
        ("1e3", float, 1e3),
    ],
)
def test_a_number_is_written_in_decimal_digits(text, kind, value):
    assert parse_number(text, kind) == value and type(parse_number(text, kind)) is kind


@pytest.mark.parametrize("text", ["1_000", "\u0663", "inf", "-nan", "0x10", "", "1e", "1,5", "1 000", "one"])
@pytest.mark.parametrize("kind", [int, float])
def test_what_only_python_takes_for_a_number_is_none(text, kind):
    with pytest.raises(ValueError):
        parse_number(text, kind)


@pytest.mark.parametrize(("option", "value"), [("--steps", "1_0"), ("--guidance", "\u0663"), ("--guidance", "inf")])
def test_the_command_line_takes_the_same_numbers(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "demo", "--prompt", "a", "--out", "a.png", option, value])
    assert f"argument {option}: invalid " in capsys.readouterr().err


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text('{"default": {"backend": "quanto", "scheme": "int8"}}', encoding="utf-8-sig")
    assert parse_plan(plan_text(str(file))) == parse_plan("quanto/int8") == parse_plan(MARK + "quanto/int8")
    assert read_text(file).startswith("{")
    data = shipped()[0]
    file.write_text(json.dumps(data.to_dict()), encoding="utf-8-sig")
    assert read_sensitivity(file) == parse_sensitivity(MARK + json.dumps(data.to_dict())) == data


def test_the_first_prompt_of_a_file_is_its_text(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("quant_core.commands.compare.compare", lambda request, *_: asked.append(request) or 1 / 0)
    file = tmp_path / "prompts.txt"
    file.write_text("a red house\n\n a blue\u2028whale \n", encoding="utf-8-sig")
    with pytest.raises(ZeroDivisionError):
        main(["compare", "demo", "--plan", "quanto/int8", "--prompts", str(file)])
    assert list(asked[0].prompts) == ["a red house", "a blue\u2028whale"]


def test_sensitivity_data_say_everything_once():
    text = json.dumps(shipped()[0].to_dict())
    with pytest.raises(SourceError, match="The sensitivity file gives 'model' twice; give it once."):
        parse_sensitivity(text.replace('"model":', '"model": "another", "model":'))


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "demo", "--plan", "quanto/int8", "--prompt", "a", "--prompts", ""),
        ("compare", "demo", "--plan", "quanto/int8", "--prompt", "a", "--out", ""),
        ("sensitivity", "demo", "--prompt", "a", "--out", ""),
        ("plan", "demo", "--budget", "1G", "--sensitivity", ""),
        ("store", "list", "--store", ""),
        ("inspect", "demo", "--revision", ""),
    ],
)
def test_an_empty_text_is_not_taken_for_an_option_that_was_not_given(arguments, capsys):
    assert main([*arguments]) == 2
    assert arguments[-2].strip("-") in capsys.readouterr().err


FALSY = (0, 0.0, False, "", [], (), {})
OPTIONAL = [
    (GenerateRequest, {"prompt": "a"}, "negative_prompt", (str, list)),
    (GenerateRequest, {"prompt": "a"}, "extra", (dict,)),
    (GenerateRequest, {"prompt": "a"}, "remember", (bool,)),
    (LoadRequest, {"source": "demo"}, "variant", ()),
    (LoadRequest, {"source": "demo"}, "revision", (str,)),
    (LoadRequest, {"source": "demo"}, "store", ()),
    (LoadRequest, {"source": "demo"}, "store_limit", (int,)),
    (LoadRequest, {"source": "demo"}, "allow_download", (bool,)),
    (Optimization, {}, "compile", ()),
    (QuantPlan, {}, "components", (dict,)),
    (QuantPlan, {}, "default", ()),
    (QuantSpec, {"backend": "quanto", "scheme": "int8"}, "options", (dict,)),
    (QuantSpec, {"backend": "quanto", "scheme": "int8"}, "skip_modules", (list, tuple)),
    (QuantSpec, {"backend": "quanto", "scheme": "int8"}, "mixed", (dict,)),
]


@pytest.mark.parametrize(("record", "needed", "name", "taken"), OPTIONAL, ids=[row[2] for row in OPTIONAL])
def test_what_is_false_or_empty_is_not_taken_for_what_was_not_given(record, needed, name, taken):
    for value in FALSY:
        if type(value) in taken:
            record(**needed, **{name: value})
        else:
            with pytest.raises(SpecError):
                record(**needed, **{name: value})
