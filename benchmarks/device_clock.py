"""Seconds and bytes of a device that computes on its own."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch


def wait(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Steps:
    """The time between marks, on the device's own clock, without waiting for it."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list = []

    def mark(self) -> None:
        """One more step is done, or asked of the device."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def median(self) -> float | None:
        """Seconds from mark to mark, once the device is done; None of less than two marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        seconds = [one.elapsed_time(other) / 1000 if self.cuda else other - one for one, other in pairs]
        return statistics.median(seconds) if seconds else None


def reset_peak(device: torch.device, empty: bool) -> None:
    """From now on `peak` counts anew; on CUDA `empty` gives back first what PyTorch holds for later.

    On the CPU by proc_pid_status(5), VmHWM and clear_refs.
    """
    if device.type == "cuda":
        wait(device)
        if empty:
            torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> dict[str, int]:
    """The most bytes since the reset: on CUDA `allocated` and `reserved`, on the CPU those of the process."""
    if device.type == "cuda":
        return {
            "allocated": torch.cuda.max_memory_allocated(device),
            "reserved": torch.cuda.max_memory_reserved(device),
        }
    status = Path("/proc/self/status").read_text().splitlines()
    most = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {"allocated": most, "reserved": most}
