"""The operations as plain functions, for any model: `from tritium.kernels import rms_norm, attention, ...`.

Each is the operation that torch.library has under `torch.ops.tritium`: on a GPU the kernel, elsewhere the definition;
with gradients, unless it says that it has none; whole under `torch.compile(fullgraph=True)`. Formulas, the order of
rounding and the floors stand at the head of the file named after the operation, beside its definition in PyTorch.

For all of them: tensors are float32, bfloat16 or float16, one dtype and one device for all that no other is said of;
nothing is written but what is named so; no call waits for the device. They raise TypeError and ValueError for what does
not fit (on a CPU what the definition raises). Values of indices (labels, positions, slots, tables, routings) lie on the
device, where nothing checks them: that is the caller's to do.
"""

from importlib import import_module

import torch
from torch import Tensor

from .cross_entropy import IGNORE_INDEX

__all__ = [
    "add_rms_norm",
    "attention",
    "combine",
    "cross_entropy",
    "decode_attention",
    "decode_linear_residual",
    "dense_attention",
    "group",
    "grouped_linear",
    "grouped_swiglu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_residual",
    "linear_swiglu",
    "norm_head",
    "norm_linear",
    "norm_linear_swiglu",
    "paged_attention",
    "qk_norm_rope",
    "qk_norm_rope_cache",
    "quantised_linear",
    "rms_norm",
    "rope_decode_attention",
    "route",
    "sample",
    "silu_mul",
    "swiglu",
]

_FILES = (  # importing one registers its operations, and those that its gradient needs
    *("attention_backward", "combine", "decode_attention", "decode_linear", "dense_attention"),
    *("grouped_linear_backward", "layer_norm"),
    *("linear_cross_entropy", "qk_norm_rope_backward", "quantised_linear", "rms_norm", "rope_decode_attention"),
    *("routing_backward", "sampling", "swiglu"),
)
for _file in _FILES:
    import_module(f".{_file}", __package__)

_OPERATIONS = torch.ops.tritium


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """RMSNorm over the last dimension (arXiv:1910.07467): x [..., N], weight [N] or None -> [..., N], contiguous.

    Normalised in float32, rounded to x's dtype, then multiplied by the weight: the published Qwen and Llama order.
    """
    found: Tensor = _OPERATIONS.rms_norm(x, weight, eps)
    return found


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(rms_norm(residual + x), residual + x) in one pass: x and residual [..., N]. The sum rounds once."""
    normalised, stream = _OPERATIONS.add_rms_norm(x, residual, weight, eps)
    return normalised, stream


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension (arXiv:1607.06450): x [..., N], weight and bias [N] or None -> [..., N]."""
    found: Tensor = _OPERATIONS.layer_norm(x, weight, bias, eps)
    return found


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight^T + bias: x [T, K], weight [N, K], bias [N] or None -> [T, N].

    A row's bits depend neither on how many rows there are nor on its place among them, which cuBLAS does not promise.
    """
    found: Tensor = _OPERATIONS.linear(x, weight, bias)
    return found


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """residual + x @ weight^T + bias, rounded once: `linear` with a residual [T, N], which is not overwritten."""
    found: Tensor = _OPERATIONS.linear_residual(x, weight, bias, residual)
    return found


def linear_swiglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """swiglu(linear(x)) in one kernel: x [T, K], weight [2F, K] with the gate's rows first, bias [2F] -> [T, F]."""
    found: Tensor = _OPERATIONS.linear_swiglu(x, weight, bias)
    return found


def quantised_linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a weight in 8 or 4 bits, as `tritium.kernels.quantised_linear.quantise` gives it: x [T, K] -> [T, N].

    8 bits: values int8 [N, K], scale float32 [N]; 4 bits: values uint8 [N, P / 2], scale [N, P / 64], P being K in
    whole blocks of 64. No gradient of the weight is of use; that of x is the definition's.
    """
    found: Tensor = _OPERATIONS.quantised_linear(x, values, scale, bias)
    return found


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [gate, up] side by side (arXiv:2002.05202): gate_up [..., 2F] -> [..., F]."""
    found: Tensor = _OPERATIONS.swiglu(gate_up)
    return found


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` of two tensors: silu(gate) * up, each [..., F] -> [..., F]."""
    found: Tensor = _OPERATIONS.silu_mul(gate, up)
    return found


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    rope_dtype: torch.dtype = torch.float32,
    norm: bool = True,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_first: bool = True,
    query_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """QK-norm and rotation of a packed projection: qkv [T, (Hq + 2 Hk) * D] -> q [T, Hq, D], k and v [T, Hk, D].

    table [context, 2, D/2] float32 holds each position's (cos, sin), positions [T] (int32 or int64) each token's row of
    it; None leaves the rotation out (RoPE in halves, arXiv:2104.09864). `rope_dtype` is float32 or qkv's dtype: the one
    in which the rotation rounds. norm=False leaves the norm out; weight [Hq + Hk, D] is its gain, a row a head, or
    None. norm_first: Qwen3's order; False: MobileLLM-R1's. query_scale [context] float32 multiplies each query.
    v is a view of qkv.
    """
    how = (table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale)
    q, k = _OPERATIONS.qk_norm_rope(qkv, num_heads, num_kv_heads, *how)
    return q, k, qkv.unflatten(1, (num_heads + 2 * num_kv_heads, -1))[:, num_heads + num_kv_heads :]


def qk_norm_rope_cache(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    *,
    rope_dtype: torch.dtype = torch.float32,
    norm: bool = True,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_first: bool = True,
    query_scale: Tensor | None = None,
) -> Tensor:
    """`qk_norm_rope` that gives q and writes k and v into the caches [Hk, pages, page_size, D], in place.

    slots [T] int64 is where each token's go: page * page_size + offset, or -1 for nowhere. It has no gradient.
    """
    how = (table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale)
    q: Tensor = _OPERATIONS.qk_norm_rope_cache(qkv, num_heads, num_kv_heads, *how, k_cache, v_cache, slots)
    return q


def attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, scale: float | None = None, window: int | None = None
) -> Tensor:
    """Causal grouped-query attention over sequences packed one after another (arXiv:2205.14135).

    q [T, Hq, D], k and v [T, Hk, D], Hq a multiple of Hk -> [T, Hq, D]. starts [sequences + 1] int32: sequence s has
    the tokens starts[s]:starts[s + 1]. scale: D^-0.5 where None. window: how many keys, its own included, a query sees.
    """
    found: Tensor = _OPERATIONS.attention_with_lse(q, k, v, starts, _scale(q, scale), window)[0]
    return found


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    starts: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The last queries of each sequence over a paged cache: a prefill, or a piece of one. It has no gradient.

    q [T, Hq, D], packed by `starts` [rows + 1]; caches [Hk, pages, page_size, D]; page_table [rows, pages] names each
    row's pages in order, lengths [rows] counts its keys, those of its queries included; all int32.
    """
    how = (page_table, starts, lengths, _scale(q, scale), window)
    found: Tensor = _OPERATIONS.paged_attention(q, k_cache, v_cache, *how)
    return found


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """One query a row over a paged cache, split by pages: q [R, Hq, D] -> [R, Hq, D]. It has no gradient.

    Otherwise as `paged_attention`; `longest`, where known, bounds the lengths, and with them the launch.
    """
    how = (page_table, lengths, _scale(q, scale), window, longest)
    found: Tensor = _OPERATIONS.decode_attention(q, k_cache, v_cache, *how)
    return found


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The last queries of each row over dense keys, left padding and room behind left out: one query, or many.

    q [B, S, Hq, D], k and v [B, Hk, L, D] (views will do) -> [B, S, Hq, D]. Row b's keys are the lengths[b] ones from
    first[b] on, those of its queries included; both [B] int32. Queries before the first key give 0.
    """
    found: Tensor = _OPERATIONS.dense_attention(q, k, v, first, lengths, _scale(q, scale), window)
    return found


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """The loss of logits [T, V] against labels [T] int64, in float32; rows whose label is `ignore_index` do not count.

    z_loss times the squared logsumexp is added (PaLM, arXiv:2204.02311). reduction: mean over the rows that count,
    sum, or none, [T]: minus log-probabilities.
    """
    found: Tensor = _OPERATIONS.cross_entropy(logits, labels, ignore_index, label_smoothing, z_loss, reduction)
    return found


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int = IGNORE_INDEX,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(x @ weight^T) whose logits are never whole in memory: x [T, K], weight [V, K], labels [T]."""
    how = (ignore_index, label_smoothing, z_loss, reduction)
    found: Tensor = _OPERATIONS.linear_cross_entropy(x, weight, labels, *how)
    return found


def route(logits: Tensor, k: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """The k likeliest experts of each token: logits [T, E] -> experts [T, k] int32, likeliest first, weights [T, k].

    Weights are softmax probabilities, divided by their sum over the k where `renormalise`. Ties go to the lower expert.
    """
    experts, weights = _OPERATIONS.route(logits, k, renormalise)
    return experts, weights


def group(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Assignments sorted by expert: experts [T, k] int32 -> order [T * k], starts [num_experts + 1], int32.

    Expert e has the assignments order[starts[e]:starts[e + 1]], assignment t * k + j being token t's j-th expert.
    """
    order, starts = _OPERATIONS.group(experts, num_experts)
    return order, starts


def grouped_linear(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """Each assignment's row by its own expert's weight, in one launch: x [T, K], weight [E, N, K] -> [T * k, N].

    order and starts as `group` gives them. k is how many assignments share a row of x: 1 where each has its own.
    """
    found: Tensor = _OPERATIONS.grouped_linear(x, weight, order, starts, k)
    return found


def grouped_swiglu(x: Tensor, weight: Tensor, order: Tensor, starts: Tensor, k: int) -> Tensor:
    """`grouped_linear` with swiglu: weight [E, 2F, K], each expert's gate first -> [T * k, F]."""
    found: Tensor = _OPERATIONS.grouped_swiglu(x, weight, order, starts, k)
    return found


def combine(outputs: Tensor, weights: Tensor, residual: Tensor) -> Tensor:
    """residual + the weighted sum of each token's experts: outputs [T * k, N], weights [T, k], residual [T, N]."""
    found: Tensor = _OPERATIONS.combine(outputs, weights, residual)
    return found


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    uniform: Tensor | None = None,
) -> Tensor:
    """Token ids [R] int64 chosen from logits [R, V]; -1 for a row that holds a NaN. It has no gradient.

    temperature 0 is greedy and needs no `uniform` [R] float32, the random number in [0, 1) that each row draws by.
    top_k 0 and top_p 1 keep every token; otherwise the k likeliest, and of those the shortest prefix with mass top_p.
    """
    found: Tensor = _OPERATIONS.sample(logits, temperature, top_k, top_p, uniform)
    return found


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """linear(rms_norm(x)) in one kernel for the few rows of a decode step: x [R, K], weight [N, K] -> [R, N].

    Without `norm_weight` no norm. With a scale, weight and scale are those of a quantised weight.
    """
    found: Tensor = _OPERATIONS.norm_linear(x, norm_weight, eps, weight, bias, scale)
    return found


def norm_linear_swiglu(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """swiglu(norm_linear(x)) in one kernel: weight [2F, K] with the gate's rows first -> [R, F]."""
    found: Tensor = _OPERATIONS.norm_linear_swiglu(x, norm_weight, eps, weight, bias, scale)
    return found


def decode_linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor | None = None
) -> Tensor:
    """`linear_residual` for the few rows of a decode step; with a scale, of a quantised weight: x [R, K] -> [R, N]."""
    found: Tensor = _OPERATIONS.decode_linear_residual(x, weight, bias, residual, scale)
    return found


def norm_head(
    x: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    scale: Tensor | None = None,
    limit: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`norm_linear` to logits [R, V], -inf from column `limit` on, and each row's likeliest token as a key [R] int64.

    The token is 2^31 - 1 less the key's low 31 bits; of equals the first. It has no gradient.
    """
    logits, best = _OPERATIONS.norm_head(x, norm_weight, eps, weight, scale, limit)
    return logits, best


def rope_decode_attention(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    table: Tensor | None,
    positions: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    rope_dtype: torch.dtype = torch.float32,
    norm: bool = True,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    norm_first: bool = True,
    query_scale: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    longest: int | None = None,
) -> Tensor:
    """`qk_norm_rope_cache` and `decode_attention` in one kernel: a packed token a row, qkv [R, (Hq + 2 Hk) * D] ->
    [R, Hq, D]. The caches are written in place; lengths count the new token. It has no gradient.
    """
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    rotation = (table, positions, rope_dtype, norm, weight, eps, norm_first, query_scale)
    keys = (k_cache, v_cache, slots, page_table, lengths, head_dim**-0.5 if scale is None else scale, window, longest)
    found: Tensor = _OPERATIONS.rope_decode_attention(qkv, num_heads, num_kv_heads, *rotation, *keys)
    return found


def _scale(q: Tensor, scale: float | None) -> float:
    head_dim: int = q.shape[-1]
    return head_dim**-0.5 if scale is None else scale
