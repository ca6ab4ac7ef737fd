"""Cross-entropy of the output projection, whose logits never stand whole.

    loss = cross_entropy(x weight^T, labels)                      (see cross_entropy.py for what it is and its options)
    dx = dlogits weight,   dweight = dlogits^T x

Chunks of CHUNK tokens are projected, and a chunk's logits are read by the loss, or become their own gradient, before
the next chunk's are made (as Liger Kernel does, Hsu et al. 2024, arXiv:2410.10989). The products are the vendor's; with
`invariant` the logits are linear.py's, so that a token's loss has the bits that its row of a whole `linear` and
`cross_entropy` has, in any batch. (Gradients are sums over tokens: the products of the backward stay the vendor's.)

Shapes: x and dx [T, K], weight and dweight [V, K], labels [T] int64, loss and its gradient scalars, or [T] (`none`).
Rounding: logits round to x's dtype, as they would standing whole, and so does their gradient; the loss is float32
(float64 stays). dweight is added up over the chunks in float32 and rounds once.
Backward: saves x, weight and labels, nothing else, and makes the logits anew: a forward that nobody differentiates does
no more than its loss needs, and nothing is held between the two.
Memory: CHUNK * V * itemsize bytes of logits instead of T * V * itemsize, twice (with their gradient); 4 * V * K bytes
for dweight while the backward runs.
Floor: 2 * T * V * K operations, backward 6 * T * V * K (the logits anew, dx, dweight).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .cross_entropy import (
    IGNORE_INDEX,
    check_gradient,
    check_options,
    cross_entropy_backward_reference,
    cross_entropy_reference,
    cross_entropy_rows,
    fake_loss,
    reduced,
    write_gradient,
)
from .launch import register, require
from .linear import linear

CHUNK = 1024  # tokens: enough for the products to run at full speed


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
) -> Tensor:
    """The definition: the loss in nats, float32 or float64, by logits that stand whole; `invariant` or not."""
    logits = F.linear(x, weight)
    return cross_entropy_reference(logits, labels, ignore_index, label_smoothing, z_loss, reduction)


def linear_cross_entropy_backward_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    gradient: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
    wanted: tuple[bool, bool] | list[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """The definition of the backward: dx and dweight, like x and weight; [0] in the place of what is not `wanted`."""
    logits = F.linear(x, weight)
    options = (ignore_index, label_smoothing, z_loss, reduction)
    dlogits = cross_entropy_backward_reference(logits, labels, gradient, *options)
    dx = dlogits @ weight if wanted[0] else x.new_empty(0)
    return dx, dlogits.t() @ x if wanted[1] else weight.new_empty(0)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
) -> Tensor:
    """By the kernel of cross_entropy.py: the loss, a float32 scalar or [T]. float32, bfloat16 or float16, weight as x.

    Raises RuntimeError where no kernel can run, TypeError and ValueError for what does not fit.
    """
    _check(x, weight, labels)
    check_options(label_smoothing, z_loss, reduction)
    product: Callable[..., Tensor] = linear if invariant else F.linear
    losses = [
        cross_entropy_rows(product(part, weight), label, ignore_index, label_smoothing, z_loss)[0]
        for part, label in zip(x.split(CHUNK), labels.split(CHUNK), strict=True)
    ]
    return reduced(torch.cat(losses), labels, ignore_index, reduction)


def linear_cross_entropy_backward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    gradient: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
    wanted: tuple[bool, bool] | list[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    """By the kernel of cross_entropy.py: dx and dweight, contiguous, like x and weight, given the loss's gradient,
    float32 and of its shape; [0] in the place of one that is not `wanted`. Raises what `linear_cross_entropy` raises.
    """
    _check(x, weight, labels, gradient)
    check_options(label_smoothing, z_loss, reduction)
    check_gradient(gradient, labels, reduction)
    product: Callable[..., Tensor] = linear if invariant else F.linear
    dx = x.new_empty(x.shape if wanted[0] else 0)
    total = torch.zeros(weight.shape if wanted[1] else 0, dtype=torch.float32, device=x.device)
    share = reduced(gradient, labels, ignore_index, reduction)
    for start in range(0, x.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        logits = product(x[chunk], weight)
        part = share[chunk] if reduction == "none" else share
        write_gradient(logits, labels[chunk], part, logits, ignore_index, label_smoothing, z_loss)
        if wanted[0]:
            torch.mm(logits, weight, out=dx[chunk])
        if wanted[1]:
            _add_product(total, logits.t(), x[chunk])
    return dx, total.to(weight.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever a and b are."""
    if a.is_cuda and a.dtype != torch.float32:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total.addmm_(a.float(), b.float())


def _check(x: Tensor, weight: Tensor, labels: Tensor, gradient: Tensor | None = None) -> None:
    require(x, weight, labels, gradient)
    if x.ndim != 2:
        raise ValueError(f"x must be [tokens, K], got {list(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or not weight.shape[0] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight must be [vocabulary, {x.shape[1]}] {x.dtype} as x, got {list(weight.shape)} {weight.dtype}"
        )
    if labels.shape != x.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be [{x.shape[0]}] torch.int64, one for each row of x, got {list(labels.shape)} {labels.dtype}"
        )


def _gradient(inputs: tuple[object, ...], needed: tuple[bool, ...], gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, labels, *rest = inputs
    wanted = [needed[0], needed[1]]
    found = torch.ops.tritium.linear_cross_entropy_backward(x, weight, labels, gradient, *rest, wanted)
    pair = [tensor if want else None for tensor, want in zip(found, wanted, strict=True)]
    return (*pair, *(None,) * (len(inputs) - 2))


def _fake(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
) -> Tensor:
    return fake_loss(x, labels, reduction)


def _fake_backward(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    gradient: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    invariant: bool = False,
    wanted: tuple[bool, bool] | list[bool] = (True, True),
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if wanted[0] else 0), weight.new_empty(weight.shape if wanted[1] else 0)


_INPUTS = "Tensor x, Tensor weight, Tensor labels"
_OPTIONS = (
    f'int ignore_index={IGNORE_INDEX}, float label_smoothing=0.0, float z_loss=0.0, str reduction="mean", '
    "bool invariant=False"
)
register(
    f"linear_cross_entropy({_INPUTS}, {_OPTIONS}) -> Tensor",
    linear_cross_entropy,
    linear_cross_entropy_reference,
    _fake,
    gradient=_gradient,
)
register(
    f"linear_cross_entropy_backward({_INPUTS}, Tensor gradient, {_OPTIONS}, bool[2] wanted=[True, True])"
    " -> (Tensor, Tensor)",
    linear_cross_entropy_backward,
    linear_cross_entropy_backward_reference,
    _fake_backward,
)
