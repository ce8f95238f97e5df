"""What the two bitsandbytes backends share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..backend import upstream_options
from ..errors import SpecError

REQUIRES = ("bitsandbytes>=0.48", "accelerate>=1.13")

_ARGUMENTS = {
    "bnb_4bit_quant_type": "scheme",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "compute_dtype": "compute_dtype",  # how diffusers' documentation writes it; its own config ignores that
    "bnb_4bit_quant_storage": "quant_storage",
    "llm_int8_threshold": "threshold",
    "llm_int8_skip_modules": "skip_modules",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
}


def upstream(bits: int, name: str, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments in our words where they ask for `bits` bits, else None.

    Raises:
        SpecError: they contradict each other or mean nothing here.
    """
    if name not in ("bitsandbytes_4bit", "bitsandbytes_8bit", "BitsAndBytesConfig"):
        return None
    said = {4: arguments.get("load_in_4bit"), 8: arguments.get("load_in_8bit")}
    asked = [wanted for wanted, value in said.items() if value]
    if name != "BitsAndBytesConfig":
        of_name = 4 if name.endswith("4bit") else 8
        if asked and asked != [of_name]:
            raise SpecError(f"{name} contradicts load_in_{12 - of_name}bit=True; keep one of them.")
        if said[of_name] is False:
            raise SpecError(f"{name} contradicts load_in_{of_name}bit=False; keep one of them.")
        asked = [of_name]
    if len(asked) != 1:
        raise SpecError("BitsAndBytesConfig must say load_in_4bit=True or load_in_8bit=True, and not both.")
    if asked != [bits]:
        return None
    options = upstream_options(name, arguments, _ARGUMENTS)
    options.pop("load_in_4bit", None)
    options.pop("load_in_8bit", None)
    return options
