"""What figures were measured with, in words."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "torchao",
    "bitsandbytes",
    "optimum-quanto",
    "gguf",
    "safetensors",
)


def machine() -> str:
    """Processor, threads, Python and the versions of the libraries."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in info if line.startswith("model name")), platform.machine())
    there = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    versions = ", ".join(f"{name} {there[name]}" for name in PACKAGES if name in there)
    cores = f"{os.cpu_count()} virtual cores of {model}, OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}"
    return f"{cores}, Python {platform.python_version()}, {versions}"
