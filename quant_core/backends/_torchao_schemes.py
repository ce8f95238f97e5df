"""What the names of torchao's schemes mean: torchao's config objects, and what other documents call the same."""

from __future__ import annotations

from ..backend import Call, Option, Scheme, Upstream, upstream_options
from ..errors import SpecError, choices

ADA, AMPERE, BLACKWELL, HOPPER = (8, 9), (8, 0), (10, 0), (9, 0)
CUDA = ("cuda",)
AUTO = "auto"
_MSLK = ("mslk-cuda>=1.0.0",)

SCHEMES = (
    Scheme(
        "int8wo",
        bits=8,
        help="8-bit integer weights, one scale per row.",
        # A pattern of Inductor's takes a kernel that is for a few rows: on a CPU 1.9 times as slow, and less exact.
        inductor={"pattern_matcher": False},
    ),
    Scheme(
        "int8dq",
        bits=8,
        help="8-bit integer weights and activations; fast only when compiled (published of an H100: 130 s, 3.4 s).",
        avoid="it crawls unless compiled",
        slow_eager="130 s a picture against 3.4 s compiled",  # github.com/sayakpaul/diffusers-torchao, Flux on an H100
    ),
    Scheme(
        "int4wo",
        bits=4,
        help="4-bit integer weights in groups.",
        devices=CUDA,
        capability=AMPERE,
        avoid="its kernel is for a few rows and crawls with a picture's",  # the same, CogVideoX-5b on an A100
    ),
    Scheme("fp8wo", bits=8, help="8-bit floating-point weights (e4m3), one scale per row."),
    Scheme("fp8dq", bits=8, help="float8 weights and activations, a scale each.", devices=CUDA, capability=ADA),
    Scheme("fp8dq_row", bits=8, help="float8 weights and activations, scales per row.", devices=CUDA, capability=ADA),
    Scheme(
        "fp8dq_int4wo",
        bits=4,
        help="4-bit integer weights, float8 activations.",
        devices=CUDA,
        capability=HOPPER,
        requires=_MSLK,
    ),
    Scheme(
        "nvfp4wo",
        bits=4,
        help="4-bit floating-point weights in blocks of 16; runs on any device.",
        avoid="it is unpacked without a kernel at each use",
    ),
    Scheme("nvfp4dq", bits=4, help="NVFP4 weights and activations.", devices=CUDA, capability=BLACKWELL),
    Scheme("mxfp8dq", bits=8, help="MXFP8 weights and activations.", devices=CUDA, capability=BLACKWELL),
)
COMPILING = {  # what torchao recommends of torch._inductor (its recommended_inductor_config_setter)
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "force_fuse_int_mm_with_mul": True,
    "triton.unique_kernel_names": True,
}
OPTIONS = (
    Option(
        "group_size",
        AUTO,
        "Weights that share a scale; auto: a row (int8wo), 128 (int4wo). A layer it does not divide stays 16 bit.",
        choices=(AUTO, "32", "64", "128", "256"),
        schemes=("int4wo", "int8wo"),
    ),
    Option(
        "packing",
        "tile_packed_to_4d",
        "How int4wo lays out its bytes; plain needs the package mslk-cuda.",
        choices=("tile_packed_to_4d", "plain"),
        schemes=("int4wo",),
        requires={"plain": _MSLK},
    ),
)

# What older documents call our schemes, and the config class that says the same.
_SHORTHANDS = {
    "int8_weight_only": "int8wo",
    "int8_dynamic_activation_int8_weight": "int8dq",
    "int4_weight_only": "int4wo",
    "float8_weight_only": "fp8wo",
    "float8wo": "fp8wo",
    "float8wo_e4m3": "fp8wo",
    "float8_dynamic_activation_float8_weight": "fp8dq",
    "float8dq": "fp8dq",
    "float8dq_e4m3": "fp8dq",
    "float8dq_e4m3_tensor": "fp8dq",
    "float8dq_e4m3_row": "fp8dq_row",
}
_CLASSES = {
    "Int8WeightOnlyConfig": "int8wo",
    "Int8DynamicActivationInt8WeightConfig": "int8dq",
    "Int4WeightOnlyConfig": "int4wo",
    "Float8WeightOnlyConfig": "fp8wo",
    "Float8DynamicActivationFloat8WeightConfig": "fp8dq",
    "Float8DynamicActivationInt4WeightConfig": "fp8dq_int4wo",
    "NVFP4WeightOnlyConfig": "nvfp4wo",
    "NVFP4DynamicActivationNVFP4WeightConfig": "nvfp4dq",
}


def group_size(scheme, options):
    """Weights that share a scale, None for a whole row or a scheme that fixes it."""
    asked = options.get("group_size", AUTO)
    return int(asked) if asked != AUTO else 128 if scheme == "int4wo" else None


def make_config(scheme, options):
    """torchao's own config object of a scheme."""
    from torchao import quantization as ao

    if scheme in ("nvfp4wo", "nvfp4dq", "mxfp8dq"):
        from torchao.prototype import mx_formats as mx

    match scheme:
        case "int8wo":
            group = group_size(scheme, options)
            return ao.Int8WeightOnlyConfig(granularity=ao.PerGroup(group) if group else ao.PerRow())
        case "int8dq":
            return ao.Int8DynamicActivationInt8WeightConfig()
        case "int4wo":
            group = group_size(scheme, options)
            return ao.Int4WeightOnlyConfig(group_size=group, int4_packing_format=options["packing"])
        case "fp8wo":
            return ao.Float8WeightOnlyConfig()
        case "fp8dq":
            return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerTensor())
        case "fp8dq_row":
            return ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
        case "fp8dq_int4wo":
            return ao.Float8DynamicActivationInt4WeightConfig()
        case "nvfp4wo":
            return mx.NVFP4WeightOnlyConfig()
        case "nvfp4dq":
            return mx.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False)  # its kernel needs mslk
        case "mxfp8dq":
            return mx.MXDynamicActivationMXWeightConfig()


def upstream(name, arguments):
    if name in _CLASSES:
        name, arguments = "TorchAoConfig", {"quant_type": Call(name, dict(arguments))}
    if name not in ("torchao", "TorchAoConfig"):
        return None
    known = {"quant_type": "scheme", "modules_to_not_convert": "skip_modules", "group_size": "group_size"}
    options = upstream_options(name, arguments, known)
    skip = options.pop("skip_modules", ())
    asked = options.pop("scheme", None)
    if isinstance(asked, Call):
        scheme = _CLASSES.get(asked.name)
        inner = dict(asked.arguments)
        if isinstance(granularity := inner.get("granularity"), Call):
            del inner["granularity"]
            match scheme, granularity.name, tuple(granularity.arguments.items()):
                case "fp8dq", "PerRow", ():
                    scheme = "fp8dq_row"
                case ("fp8dq", "PerTensor", ()) | ("int8wo" | "int8dq", "PerRow", ()):
                    pass
                case "int8wo", "PerGroup", (("group_size" | "quant_type", group),) if "group_size" not in inner:
                    inner["group_size"] = group
                case _:
                    raise SpecError(f"{asked.name} with {granularity!r} is none of ours; leave granularity out.")
        if inner.get("version", 2) != 2:
            raise SpecError(f"{asked.name} of version {inner['version']} is gone from torchao; leave version out.")
        if scheme:
            known = {"group_size": "group_size", "int4_packing_format": "packing", "version": "version"}
            inner = upstream_options(asked.name, inner, known)
            if both := options.keys() & inner.keys():
                raise SpecError(f"TorchAoConfig and {asked.name} both have {choices(both)}; keep one of them.")
            options |= inner
        options.pop("version", None)
        asked = asked.name
    else:
        scheme = _SHORTHANDS.get(str(asked), asked)
    if scheme not in [known.name for known in SCHEMES]:
        known = choices(known.name for known in SCHEMES)
        raise SpecError(f"TorchAoConfig asks for {asked!r}, which is none of ours; write one of: {known}.")
    return Upstream(scheme, options, skip)
