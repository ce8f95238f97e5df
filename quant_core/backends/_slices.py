"""Large matrices quantized slice by slice: libraries take many times the size of what they are given at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SLICE = 2**20  # weights; a matrix of more is cut


def is_large(matrix: Any) -> bool:
    """Whether a matrix is worth cutting, and has the rows for it."""
    return _count(matrix) > 1


def _count(matrix: Any) -> int:
    # Two rows at least: optimum-quanto would give a single one a scale of another shape.
    return min(-(-matrix.numel() // SLICE), len(matrix) // 2)


def by_rows(matrix: Any, quantize: Callable[[Any], Sequence[Any]]) -> list[Any]:
    """The tensors that `quantize` makes of a large matrix, made of a slice of its rows at a time.

    Right where the rows do not depend on each other and each tensor has as many rows for each of them.
    """
    whole: list[Any] = []  # at once, since parts kept between a slice's working memory would keep that, too
    begin = 0
    for rows in matrix.tensor_split(_count(matrix)):
        end = begin + len(rows)
        for index, part in enumerate(quantize(rows)):
            each = len(part) // len(rows)
            if begin == 0:
                whole.append(part.new_empty((each * len(matrix), *part.shape[1:])))
            whole[index][each * begin : each * end] = part
        begin = end
    return whole
