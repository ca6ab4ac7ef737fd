"""The end of a decode step: what was sampled is noted, and each row stands at its next token, all on the device.

    history[n, r] = token_r, or NOTHING where row r had ended          n: the step's number, counted on the device
    row r ends with a stop token or with -1 (its logits were not numbers); else
    tokens_r = token_r;  positions_r, lengths_r, angles_r += 1;  slots_r = table[r, p // page] * page + p % page

A row that has ended stands still: it reads and writes its cache no more (slot -1), and gives NOTHING from then on. So
the host need not look before the next step may begin.

Shapes: sampled, tokens, positions, slots and angles [R] int64; lengths and ended [R] int32; page_table [R, pages]
int32; history [steps, R] int64; step [1] int64; uniforms [R, steps] and uniform [R] float32; stops [S] int64. All but
sampled, page_table, uniforms and stops are written, in place.
Rounding: none, everything is an integer or a copy.
Floor: about 60 bytes a row: one launch.
"""

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require_able, tl, triton
from .overlap import dependent, start, wait

NOTHING = -2
"""What a row that has ended gives."""


def advance_reference(
    sampled: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    page_table: Tensor,
    page_size: int,
    ended: Tensor,
    history: Tensor,
    step: Tensor,
    stops: Tensor,
    angles: Tensor | None = None,
    uniforms: Tensor | None = None,
    uniform: Tensor | None = None,
) -> None:
    """The definition. `angles` are the rows of a table that goes by more than positions; `uniform` becomes the next
    step's column of `uniforms`, and stays as it is behind the last.
    """
    before = ended != 0
    history.index_copy_(0, step, torch.where(before, NOTHING, sampled).unsqueeze(0))
    now = before | (sampled < 0) | torch.isin(sampled, stops)
    ended.copy_(now)
    tokens.copy_(torch.where(now, tokens, sampled))
    positions += ~now
    lengths += ~now
    if angles is not None:
        angles += ~now
    page = page_table.gather(1, (positions // page_size).clamp(max=page_table.shape[1] - 1).unsqueeze(1)).squeeze(1)
    slots.copy_(torch.where(now, -1, page.to(torch.int64) * page_size + positions % page_size))
    step += 1
    if uniforms is not None and uniform is not None:
        uniform.copy_(uniforms.index_select(1, step.clamp(max=uniforms.shape[1] - 1)).squeeze(1))


@triton.jit(do_not_specialize=["rows", "steps", "num_stops", "max_pages"])
def _advance_kernel(
    sampled_ptr,
    tokens_ptr,
    positions_ptr,
    lengths_ptr,
    slots_ptr,
    table_ptr,  # [R, max_pages]
    ended_ptr,
    history_ptr,  # [steps, R]
    step_ptr,
    stops_ptr,
    angles_ptr,
    uniforms_ptr,  # [R, steps]
    uniform_ptr,
    rows,
    steps,
    num_stops,
    max_pages,
    PAGE: tl.constexpr,
    HAS_ANGLES: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    SYNC: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One program: the number of the step is read and written by it alone."""
    start(SYNC)
    wait(step_ptr, 0, SYNC)
    step = tl.load(step_ptr)
    tl.debug_barrier()  # every thread has read the number before one of them writes the next
    for first in range(0, rows, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        token = tl.load(sampled_ptr + o_r, mask=m_r, other=0)
        before = tl.load(ended_ptr + o_r, mask=m_r, other=1)
        position = tl.load(positions_ptr + o_r, mask=m_r, other=0)
        length = tl.load(lengths_ptr + o_r, mask=m_r, other=0)
        tl.store(history_ptr + step * rows + o_r, tl.where(before != 0, -2, token), mask=m_r & (step < steps))
        ended = (before != 0) | (token < 0)
        for stop in range(num_stops):
            ended = ended | (token == tl.load(stops_ptr + stop))
        moves = (~ended).to(tl.int32)
        position += moves
        page = tl.minimum(position // PAGE, max_pages - 1)
        page = tl.load(table_ptr + o_r.to(tl.int64) * max_pages + page, mask=m_r, other=0).to(tl.int64)
        tl.store(ended_ptr + o_r, ended.to(tl.int32), mask=m_r)
        tl.store(tokens_ptr + o_r, token, mask=m_r & ~ended)
        tl.store(positions_ptr + o_r, position, mask=m_r)
        tl.store(lengths_ptr + o_r, length + moves, mask=m_r)
        tl.store(slots_ptr + o_r, tl.where(ended, -1, page * PAGE + position % PAGE), mask=m_r)
        if HAS_ANGLES:
            tl.store(angles_ptr + o_r, tl.load(angles_ptr + o_r, mask=m_r, other=0) + moves, mask=m_r)
        if HAS_UNIFORM:
            o_u = o_r.to(tl.int64) * steps + tl.minimum(step + 1, steps - 1)
            tl.store(uniform_ptr + o_r, tl.load(uniforms_ptr + o_u, mask=m_r, other=0.0), mask=m_r)
    tl.store(step_ptr, step + 1)


def advance(
    sampled: Tensor,
    tokens: Tensor,
    positions: Tensor,
    lengths: Tensor,
    slots: Tensor,
    page_table: Tensor,
    page_size: int,
    ended: Tensor,
    history: Tensor,
    step: Tensor,
    stops: Tensor,
    angles: Tensor | None = None,
    uniforms: Tensor | None = None,
    uniform: Tensor | None = None,
) -> None:
    """The kernel. Every tensor is contiguous. Raises RuntimeError where no kernel can run, ValueError for what does not
    fit. A step past the end of `history` is not noted.
    """
    require_able(sampled)
    rows, steps = sampled.shape[0], history.shape[0]
    wanted = {
        "sampled": (sampled, (rows,), torch.int64),
        "tokens": (tokens, (rows,), torch.int64),
        "positions": (positions, (rows,), torch.int64),
        "lengths": (lengths, (rows,), torch.int32),
        "slots": (slots, (rows,), torch.int64),
        "page_table": (page_table, (rows, page_table.shape[-1]), torch.int32),
        "ended": (ended, (rows,), torch.int32),
        "history": (history, (steps, rows), torch.int64),
        "step": (step, (1,), torch.int64),
        "stops": (stops, (stops.shape[0],), torch.int64),
        "angles": (angles, (rows,), torch.int64),
        "uniforms": (uniforms, (rows, steps), torch.float32),
        "uniform": (uniform, (rows,), torch.float32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor is None:
            continue
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous {list(shape)} {dtype}, got {list(tensor.shape)} {tensor.dtype}"
            )
        if tensor.device != sampled.device:
            raise ValueError(f"{name} lies on {tensor.device}, sampled on {sampled.device}: they must be on one device")
    if (uniforms is None) != (uniform is None):
        raise ValueError("uniforms and uniform come together, or neither does")
    if page_size < 1 or not page_table.shape[1]:
        raise ValueError(f"a page of {page_size} tokens, {page_table.shape[1]} a row: there must be room")
    if not rows:
        return
    launch(
        _advance_kernel,
        (1,),
        sampled,
        tokens,
        positions,
        lengths,
        slots,
        page_table,
        ended,
        history,
        step,
        stops,
        angles,
        uniforms,
        uniform,
        rows,
        steps,
        stops.shape[0],
        page_table.shape[1],
        PAGE=page_size,
        HAS_ANGLES=angles is not None,
        HAS_UNIFORM=uniforms is not None,
        BLOCK_R=min(max(32, triton.next_power_of_2(rows)), 256),
        **dependent(sampled.device, True),
        **tuning.config("advance", sampled.device),
    )


register(
    "advance(Tensor sampled, Tensor(a!) tokens, Tensor(b!) positions, Tensor(c!) lengths, Tensor(d!) slots, "
    "Tensor page_table, int page_size, Tensor(e!) ended, Tensor(f!) history, Tensor(g!) step, Tensor stops, "
    "Tensor(h!)? angles=None, Tensor? uniforms=None, Tensor(i!)? uniform=None) -> ()",
    advance,
    advance_reference,
)
