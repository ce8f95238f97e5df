"""What the two bitsandbytes backends share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from ..architecture import is_transformers
from ..backend import Export, upstream_options
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
    for wanted, value in said.items():
        if not isinstance(value, (bool, type(None))):
            raise SpecError(f"load_in_{wanted}bit is {value!r}; it takes True or False, and true or false in JSON.")
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


def export(model: Any, layers: Collection[str], left_out: Collection[str], arguments: Mapping[str, Any]) -> Export:
    """With what the libraries make of `llm_int8_skip_modules`: transformers takes regular expressions and keeps some
    modules by itself, diffusers takes names and parts of names, and the last name of a layer for all of that name."""
    if is_transformers(model):
        from transformers import BitsAndBytesConfig

        skipped = [f"^{re.escape(name)}$" for name in left_out]
        kept = model._keep_in_fp32_modules or ()
        # As transformers.quantizers.quantizers_utils.should_convert_module matches them.
        plain = [
            path for path in layers if any(re.match(rf"(?:{key})(?:\.|$)", path) or path.endswith(key) for key in kept)
        ]
        return Export(BitsAndBytesConfig(llm_int8_skip_modules=skipped, **arguments).to_dict(), tuple(plain))
    from diffusers import BitsAndBytesConfig

    config = BitsAndBytesConfig(llm_int8_skip_modules=sorted(left_out), **arguments).to_dict()
    for name in sorted(left_out):
        also = [path for path in layers if f"{name}." in path or path.rpartition(".")[2] == name]
        if also:
            return Export(config, (), f"diffusers cannot leave out {name} alone, which means {also[0]} to it too")
    return Export(config, note="diffusers opens it only where there is a GPU")
