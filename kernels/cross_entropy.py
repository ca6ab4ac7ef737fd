"""Cross-entropy of next-token prediction, with label smoothing and z-loss.

    loss = sum over the rows whose label is not `ignore_index` of
           lse - (1 - s) x[label] - s mean(x) + z lse^2,   lse = log(sum(exp(x)))
    d loss / d x = (1 + 2 z lse) softmax(x) - (1 - s) one-hot(label) - s / V,   0 in the rows that are ignored

s is `label_smoothing` (Szegedy et al. 2016, arXiv:1512.00567), z is `z_loss` (Chowdhery et al. 2022, arXiv:2204.02311,
section 5), and the reduction `mean` divides by the number of rows that count, by 1 where none does: nothing to predict
is a loss of 0, with gradients of 0. With `none` there is a loss a row, 0 where it is ignored: without smoothing and
z-loss, minus the log-probability of the label. A row that is ignored may hold anything. A label that is neither
`ignore_index` nor 0 to V - 1 makes the loss NaN, and its row of the gradient: labels are on the device, where nobody
can raise an error.

Shapes: logits and their gradient [T, V], labels [T] int64, loss and its gradient scalars, with `none` [T].
Rounding: float32 throughout (float64 stays); the gradient rounds once to logits' dtype. The maximum is taken out before
the label's logit is subtracted, so that a constant added to a row costs no digits.
Order: a row's sums are BLOCK_V sums side by side, each over every BLOCK_V-th logit, and a tree over those; the rows are
added likewise, by one program. So a row's bits depend on nothing but the row, and the loss has the same bits each time.
The maximum is found in the same pass, as in Milakov & Gimelshein 2018 (arXiv:1805.02867), by each sum for itself.
Backward: saves logits and labels, nothing else. It finds a row's maximum and sum anew, then writes the gradient into a
new tensor.
Floor: numel(logits) * itemsize bytes read once; the backward reads as many, and writes as many. About 5 operations a
logit, and 6 more backward. (The backward reads a row twice, the second time just after the first: from a cache, where
it holds the rows that are in flight.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import wide, wide_dtype

IGNORE_INDEX = -100
REDUCTIONS = ("mean", "sum", "none")
BLOCK_T = 1024  # losses added side by side: fixes the order over the rows


def _count(labels: Tensor, ignore_index: int, reduction: str) -> Tensor | int:
    """What a sum over the rows is divided by."""
    return torch.clamp((labels != ignore_index).sum(), min=1) if reduction == "mean" else 1


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition: the loss in nats, float32 or float64.

    Raises ValueError for a smoothing outside 0 to 1, a negative z-loss or another reduction than mean, sum and none.
    """
    check_options(label_smoothing, z_loss, reduction)
    counted, vocabulary = labels != ignore_index, logits.shape[-1]
    x = wide(logits).masked_fill(~counted.unsqueeze(-1), 0.0)
    inside = (labels >= 0) & (labels < vocabulary)
    log_p = F.log_softmax(x, dim=-1)
    losses = -log_p.gather(-1, labels.clamp(0, vocabulary - 1).unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(-1)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(x, dim=-1).square()
    losses = losses.masked_fill(~counted, 0.0) * torch.where(inside | ~counted, 1.0, float("nan"))
    return losses if reduction == "none" else losses.sum() / _count(labels, ignore_index, reduction)


def cross_entropy_backward_reference(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The definition of the backward: the gradient of the logits, like them, given that of the loss."""
    check_options(label_smoothing, z_loss, reduction)
    counted, vocabulary = labels != ignore_index, logits.shape[-1]
    x = wide(logits).masked_fill(~counted.unsqueeze(-1), 0.0)
    inside = (labels >= 0) & (labels < vocabulary)
    slope = x.softmax(dim=-1)
    if z_loss:
        slope = slope * (1 + 2 * z_loss * torch.logsumexp(x, dim=-1, keepdim=True))
    hot = labels.unsqueeze(-1) == torch.arange(vocabulary, device=labels.device)
    slope = slope - (1 - label_smoothing) * hot.to(x.dtype) - label_smoothing / vocabulary
    share = torch.where(inside, gradient.to(x.dtype) / _count(labels, ignore_index, reduction), float("nan"))
    return (slope * share.unsqueeze(-1)).masked_fill(~counted.unsqueeze(-1), 0.0).to(logits.dtype)


@triton.jit
def _statistics(row_ptr, pivot, V: tl.constexpr, SMOOTH: tl.constexpr, BLOCK_V: tl.constexpr):
    """Of one row: the maximum, the sum of exp(x - maximum), and where SMOOTH that of x - pivot, in float32."""
    o_v = tl.arange(0, BLOCK_V)
    # The lowest number, not -inf: a difference to it is never a NaN.
    tops = tl.full([BLOCK_V], -3.4028234663852886e38, dtype=tl.float32)
    sums = tl.zeros([BLOCK_V], dtype=tl.float32)
    apart = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, V, BLOCK_V):
        mask = start + o_v < V
        x = tl.load(row_ptr + start + o_v, mask=mask, other=float("-inf")).to(tl.float32)
        # Of the two exponentials of an online softmax one is exp(0).
        ratio = tl.exp(-tl.abs(x - tops))
        sums = tl.where(x > tops, sums * ratio + 1.0, sums + ratio)
        tops = tl.maximum(tops, x)
        if SMOOTH:
            apart += tl.where(mask, x - pivot, 0.0)
    top = tl.max(tops, axis=0)
    return top, tl.sum(sums * tl.exp(tops - top), axis=0), tl.sum(apart, axis=0)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_kernel(
    logits_ptr,  # [T, V], rows `stride_x` apart
    labels_ptr,  # [T]
    losses_ptr,  # [T]
    logsumexp_ptr,  # [T]
    stride_x,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        tl.store(logsumexp_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + row * stride_x
        inside = (label >= 0) & (label < V)
        chosen = tl.load(row_ptr + label, mask=inside, other=0.0).to(tl.float32)
        chosen = tl.where(inside, chosen, float("nan"))
        pivot = tl.where(chosen == float("-inf"), 0.0, chosen)  # -inf - -inf would be a NaN
        top, total, apart = _statistics(row_ptr, pivot, V, SMOOTH, BLOCK_V)
        log_total = tl.log(total)
        logsumexp = top + log_total
        loss = log_total - (chosen - top)
        if SMOOTH:
            loss -= smoothing / V * apart
        tl.store(losses_ptr + row, loss + z_loss * logsumexp * logsumexp)
        tl.store(logsumexp_ptr + row, logsumexp)


@triton.jit(do_not_specialize=["num_rows", "ignore_index"])
def _reduce_kernel(
    values_ptr,  # [T] to be added, or one number
    labels_ptr,  # [T]
    out_ptr,  # one number
    num_rows,
    ignore_index,
    ADD: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The sum of the values, or the number as it is; divided by how many rows count, where MEAN."""
    o_t = tl.arange(0, BLOCK_T)
    sums = tl.zeros([BLOCK_T], dtype=tl.float32)
    counts = tl.zeros([BLOCK_T], dtype=tl.int32)
    for start in range(0, num_rows, BLOCK_T):
        mask = start + o_t < num_rows
        if ADD:
            sums += tl.load(values_ptr + start + o_t, mask=mask, other=0.0)
        if MEAN:
            labels = tl.load(labels_ptr + start + o_t, mask=mask, other=ignore_index)
            counts += (labels != ignore_index).to(tl.int32)
    result = tl.sum(sums, axis=0) if ADD else tl.load(values_ptr)
    if MEAN:
        result = tl.div_rn(result, tl.maximum(tl.sum(counts, axis=0), 1).to(tl.float32))
    tl.store(out_ptr, result)


@triton.jit(do_not_specialize=["ignore_index"])
def _cross_entropy_backward_kernel(
    logits_ptr,  # [T, V], rows `stride_x` apart
    labels_ptr,  # [T]
    share_ptr,  # the gradient of one row's loss: one number, or PER_ROW [T]
    dlogits_ptr,  # [T, V], contiguous
    stride_x,
    ignore_index,
    smoothing,
    z_loss,
    V: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    label = tl.load(labels_ptr + row)
    out_ptr = dlogits_ptr + row * V
    if label == ignore_index:
        nothing = tl.zeros([BLOCK_V], dtype=dlogits_ptr.dtype.element_ty)
        for start in range(0, V, BLOCK_V):
            tl.store(out_ptr + start + o_v, nothing, mask=start + o_v < V)
    else:
        row_ptr = logits_ptr + row * stride_x
        top, total, _ = _statistics(row_ptr, 0.0, V, False, BLOCK_V)
        slope = tl.div_rn(1.0 + 2.0 * z_loss * (top + tl.log(total)), total)
        share = tl.load(share_ptr + (row if PER_ROW else 0))
        share = tl.where((label >= 0) & (label < V), share, float("nan"))
        for start in range(0, V, BLOCK_V):
            mask = start + o_v < V
            x = tl.load(row_ptr + start + o_v, mask=mask, other=0.0).to(tl.float32)
            target = tl.where(start + o_v == label, 1.0 - smoothing, 0.0) + smoothing / V
            gradient = share * (tl.exp(x - top) * slope - target)
            tl.store(out_ptr + start + o_v, gradient.to(dlogits_ptr.dtype.element_ty), mask=mask)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The kernel: the loss of logits [T, V] (float32, bfloat16 or float16; rows may be strided), a float32 scalar, or
    [T] where the reduction is `none`.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit. Waits for nothing.
    """
    losses, _ = cross_entropy_rows(logits, labels, ignore_index, label_smoothing, z_loss)
    check_options(label_smoothing, z_loss, reduction)
    return reduced(losses, labels, ignore_index, reduction)


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The kernel before its reduction: each row's loss and its logsumexp, float32 [T]; both 0 where it is ignored.

    Raises what `cross_entropy` raises.
    """
    _check(logits, labels)
    check_options(label_smoothing, z_loss, "sum")
    rows, width = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    logsumexp = torch.empty_like(losses)
    if rows:
        flat = logits if logits.stride(1) == 1 else logits.contiguous()
        launch(
            _cross_entropy_kernel,
            (rows,),
            flat,
            labels.contiguous(),
            losses,
            logsumexp,
            flat.stride(0),
            ignore_index,
            label_smoothing,
            z_loss,
            V=width,
            SMOOTH=label_smoothing > 0,
            **tuning.config("cross_entropy", logits.device, width=width),
        )
    return losses, logsumexp


def cross_entropy_backward(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The kernel of the backward: the logits' gradient [T, V], contiguous, in their dtype, given the loss's, float32
    and of its shape. Raises what `cross_entropy` raises.
    """
    _check(logits, labels, gradient)
    check_options(label_smoothing, z_loss, reduction)
    check_gradient(gradient, labels, reduction)
    dlogits = logits.new_empty(logits.shape)
    if not logits.shape[0]:
        return dlogits
    share = reduced(gradient, labels, ignore_index, reduction)
    write_gradient(logits, labels, share, dlogits, ignore_index, label_smoothing, z_loss)
    return dlogits


def write_gradient(
    logits: Tensor,
    labels: Tensor,
    share: Tensor,
    out: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> None:
    """`cross_entropy_backward` without its checks into `out` [T, V], contiguous, which may be the logits themselves.

    `share` is the gradient of one row's loss, a float32 scalar or [T]. There must be a row.
    """
    rows, width = logits.shape
    flat = logits if logits.stride(1) == 1 else logits.contiguous()
    launch(
        _cross_entropy_backward_kernel,
        (rows,),
        flat,
        labels.contiguous(),
        share.contiguous(),
        out,
        flat.stride(0),
        ignore_index,
        label_smoothing,
        z_loss,
        V=width,
        PER_ROW=share.ndim == 1,
        **tuning.config("cross_entropy_backward", logits.device, width=width),
    )


def reduced(values: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The sum of values [T], or a scalar as it is; divided by the number of rows that count, for `mean`. For `none`
    the values as they are.
    """
    if reduction == "none" or (reduction == "sum" and values.ndim == 0):
        return values
    out = torch.empty((), dtype=torch.float32, device=values.device)
    launch(
        _reduce_kernel,
        (1,),
        values,
        labels.contiguous(),
        out,
        labels.shape[0],
        ignore_index,
        ADD=values.ndim == 1,
        MEAN=reduction == "mean",
        BLOCK_T=BLOCK_T,
        num_warps=4,
    )
    return out


def _check(logits: Tensor, labels: Tensor, gradient: Tensor | None = None) -> None:
    require(logits, labels, gradient)
    if logits.ndim != 2 or not 0 < logits.shape[1] < 2**31 - 2**16:
        raise ValueError(f"logits must be [tokens, vocabulary] with at least one word, got {list(logits.shape)}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be [{logits.shape[0]}] torch.int64, one for each row of the logits, got "
            f"{list(labels.shape)} {labels.dtype}"
        )


def check_options(label_smoothing: float, z_loss: float, reduction: str) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be 0 to 1, got {label_smoothing}")
    if not z_loss >= 0:
        raise ValueError(f"z_loss must be 0 or more, got {z_loss}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be {' or '.join(REDUCTIONS)}, got {reduction}")


def check_gradient(gradient: Tensor, labels: Tensor, reduction: str) -> None:
    wanted = tuple(labels.shape) if reduction == "none" else ()
    if tuple(gradient.shape) != wanted or gradient.dtype != torch.float32:
        what = f"{list(wanted)} torch.float32" if wanted else "a torch.float32 scalar"
        raise ValueError(f"gradient must be {what}, got {list(gradient.shape)} {gradient.dtype}")


def fake_loss(like: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """The loss's shape and dtype, on like's device."""
    return like.new_empty(labels.shape if reduction == "none" else (), dtype=wide_dtype(like.dtype))


def _fake(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    return fake_loss(logits, labels, reduction)


def _gradient(inputs: tuple[object, ...], needed: tuple[bool, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
    logits, labels, *rest = inputs
    nothing = (None,) * (len(inputs) - 1)
    if not needed[0]:
        return (None, *nothing)
    return (torch.ops.tritium.cross_entropy_backward(logits, labels, gradient, *rest), *nothing)


_OPTIONS = f'int ignore_index={IGNORE_INDEX}, float label_smoothing=0.0, float z_loss=0.0, str reduction="mean"'
register(
    f"cross_entropy(Tensor logits, Tensor labels, {_OPTIONS}) -> Tensor",
    cross_entropy,
    cross_entropy_reference,
    _fake,
    gradient=_gradient,
)
register(
    f"cross_entropy_backward(Tensor logits, Tensor labels, Tensor gradient, {_OPTIONS}) -> Tensor",
    cross_entropy_backward,
    cross_entropy_backward_reference,
    lambda logits, *rest, **options: logits.new_empty(logits.shape),
)
