"""The end of a decode step: with and without what it may leave out, one row and more than a block holds."""

from typing import Any

import torch
from tritium.kernels.advance import advance

from .matrix import Case, meta


def case(rows: int, whole: bool) -> Case:
    def whole_numbers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return meta(*shape, dtype=dtype)

    def call() -> Any:
        column = whole_numbers(rows)
        narrow = whole_numbers(rows, dtype=torch.int32)
        table, history = whole_numbers(rows, 9, dtype=torch.int32), whole_numbers(100, rows)
        args = (column, column, column, narrow, column, table, 256, narrow, history)
        optional = (column, meta(rows, 100, dtype=torch.float32), meta(rows, dtype=torch.float32)) if whole else ()
        return advance(*args, whole_numbers(1), whole_numbers(2), *optional)

    return Case(f"{rows} rows{' whole' * whole}", call)


CASES = [case(1, False), case(300, True)]
