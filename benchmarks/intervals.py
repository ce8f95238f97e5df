"""95% intervals by the bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import torch

RESAMPLES = 2000


def interval(
    statistic: Callable[..., torch.Tensor], *columns: torch.Tensor, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The 95% interval of a statistic of rows, by resampling the rows.

    The columns are (rows,) each; `statistic` takes as many of (resamples, rows) and reduces the last dimension. A row
    is drawn with all its columns. The percentile bootstrap: Efron and Tibshirani, "An Introduction to the Bootstrap"
    (1993), chapter 13.
    """
    rows = len(columns[0])
    picks = torch.randint(rows, (resamples, rows), generator=torch.Generator().manual_seed(seed))
    found = statistic(*(column.double()[picks] for column in columns))
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def mean(values: torch.Tensor) -> torch.Tensor:
    """The mean of each resample."""
    return values.mean(-1)


def decibels(errors: torch.Tensor) -> torch.Tensor:
    """The PSNR of each resample's mean squared error, of values in 0..1: 10 log10(1 / mean)."""
    return -10 * errors.mean(-1).log10()


def share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The sum of one column as a share of another's."""
    return part.sum(-1) / whole.sum(-1)
