"""Ways with options, as data and as text."""

import pytest

from quant_core import SpecError
from quant_core.backend import Option
from quant_core.settings import Setting, Way, make_setting, parse_setting

WAYS = (
    Way("plain", "Nothing to say."),
    Way(
        "fine",
        "Much to say.",
        (
            Option("mode", "fast", choices=("fast", "slow")),
            Option("deep", False),
            Option("count", 2, minimum=1, maximum=9),
            Option("share", 0.5, minimum=0.0, maximum=1.0),
        ),
    ),
)


def parse(text):
    return make_setting("work", *parse_setting("work", text, WAYS), WAYS)


def test_off_is_no_setting():
    assert parse("off") is None


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("fine", {"mode": "fast", "deep": False, "count": 2, "share": 0.5}),
        ("fine,deep", {"mode": "fast", "deep": True, "count": 2, "share": 0.5}),
        (" fine , mode = slow,count=9", {"mode": "slow", "deep": False, "count": 9, "share": 0.5}),
        ("fine,deep=false,share=1", {"mode": "fast", "deep": False, "count": 2, "share": 1.0}),
    ],
)
def test_a_text_gives_the_options_and_their_defaults(text, options):
    setting = parse(text)
    assert setting == Setting("fine", options)
    assert parse(str(setting)) == setting, "its text says the same again"
    assert {name: type(value) for name, value in setting.options.items()} == {
        name: type(value) for name, value in options.items()
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fin", "work has no 'fin' (did you mean 'fine'?); use one of: fine, off, plain."),
        ("off,deep", "work is off, which takes no deep; leave it out."),
        ("plain,deep", "work plain has no option 'deep'; it takes no options."),
        ("fine,deeep", "work fine has no option 'deeep' (did you mean 'deep'?); it takes: count, deep, mode, share."),
        ("fine,mode=quick", "mode is 'quick'; use one of: fast, slow."),
        ("fine,count=two", "work says count=two; it takes a whole number."),
        ("fine,count=10", "count is 10; it must be within 1 and 9."),
        ("fine,deep=yes", "work says deep=yes; write true or false."),
        ("fine,deep,deep=false", "work says deep twice; keep one of them."),
        ("fine,share=nan", "work says share=nan; it takes a number."),
        ("fine,share=0.1_0", "work says share=0.1_0; it takes a number."),
        ("fine,count=\u0663", "work says count=\u0663; it takes a whole number."),
        ("fine,count", "work says no value of count; write count=2."),
        ("fine,deep,", "work is 'fine,deep,', which has an empty option; leave out the comma."),
        ("", "work has no ''; use one of: fine, off, plain."),
    ],
)
def test_a_wrong_text_is_told_so(text, message):
    with pytest.raises(SpecError) as raised:
        parse(text)
    assert str(raised.value) == message
