"""What does the end of a decode step cost: one launch, where PyTorch needs a dozen?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tritium.kernels.advance import advance_reference

from ..case import Call, Case, Draw, launcher

PAGE, PAGES, STEPS = 256, 16, 4096


def step_end(rows: int) -> Case:
    def make(draw: Draw) -> tuple[Any, ...]:
        positions = draw.whole([100] * rows).to(torch.int64)
        narrow = draw.whole([0] * rows)
        table = draw.permutation(rows * PAGES).to(torch.int32).view(rows, PAGES)
        history, step = torch.zeros(STEPS, rows, dtype=torch.int64, device=draw.device), narrow[:1].to(torch.int64)
        stops = draw.whole([1, 2]).to(torch.int64)
        sampled = draw.whole([5] * rows).to(torch.int64)
        held = (positions.clone(), positions, (positions + 1).to(torch.int32), positions.clone())
        return (sampled, *held, table, PAGE, narrow, history, step, stops)

    def ours(*args: Any) -> Call:
        advance = launcher("advance")

        def run() -> Tensor:
            args[9].zero_()  # the first step, each time
            advance(*args)
            return args[8][0]

        return run

    def definition(*args: Any) -> Tensor:
        args[9].zero_()
        advance_reference(*args)
        history: Tensor = args[8]
        return history[0]

    def check(out: Tensor, args: Sequence[Any]) -> str | None:
        return None if torch.equal(out, args[0]) else f"noted {out.tolist()} for {args[0].tolist()}"

    return Case(
        name=f"{rows} rows",
        make=make,
        ours=ours,
        definition=definition,
        reads=36 * rows,
        writes=40 * rows,
        flop=0,
        check=check,
        peers={"torch": lambda *args: lambda: definition(*args)},
    )


CASES = [step_end(rows) for rows in (1, 32)]
SMOKE = [step_end(3)]
