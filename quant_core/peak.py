"""How much memory a run took at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_FIRST = "first run: warm-up included"
_LATER = "later run: without the heap that earlier ones left"
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Peak:
    """Bytes that came on top of what was there at the beginning, None where they cannot be told."""

    extra: int | None = None
    meaning: str = ""  # what is counted


@contextmanager
def measured(device: torch.device, is_first: bool) -> Iterator[Peak]:
    """Measure a run of a pipeline: on CUDA what PyTorch allocated on the device, on the CPU what the process held.

    Of a process Linux tells it (proc_pid_status(5): VmHWM, reset through clear_refs); pages of mapped weight files,
    which it can drop at any time, are not counted. In its first run a pipeline also grows the process by what
    libraries set up once; in later ones it takes up again what the allocator held back, which is no growth. On CUDA
    what other models gave back meanwhile makes it too small.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.extra = max(torch.cuda.max_memory_allocated(device) - before, 0)
        peak.meaning = "PyTorch's memory on the GPU"
        return
    if device.type != "cpu":
        yield peak
        return
    begin = _reset()
    yield peak
    if begin:
        end = _status()
        peak.extra = max(end["VmHWM"] - begin["VmRSS"] - max(end["RssFile"] - begin["RssFile"], 0), 0)
        peak.meaning = f"weights and process growth, {_FIRST if is_first else _LATER}"


def _reset() -> dict[str, int] | None:
    try:
        _RESET.write_text("5")
        return _status()
    except OSError:  # not on Linux, or not allowed
        return None


def _status() -> dict[str, int]:
    lines = (line.split() for line in _STATUS.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:", "RssFile:")}
