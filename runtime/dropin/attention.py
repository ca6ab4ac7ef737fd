"""attn_implementation="tritium": attention of `transformers`' models by our kernels, and the masks that go with it.

`transformers` asks the mask function once a forward what each query may see, and gives the answer to every layer. Where
that is causal attention, with or without a window, over rows that are padded on the left, on the right or on both
sides, the answer here is a row's bounds, a few integers; the kernels leave padding out instead of masking it. So a row
has the bits that it has alone. For all else (packed sequences, chunked attention, masks with holes, masks of one's own)
it is what transformers' own `sdpa` gets, and `sdpa` computes.
"""

from typing import Any

import torch
from torch import Tensor

from ...kernels.attention import WIDEST
from ...kernels.functional import dense_attention
from ...kernels.launch import DTYPES
from ..errors import TritiumError
from ..operations import DIFFERENTIABLE
from .packages import theirs

_masks = theirs("masking_utils")
_imports = theirs("utils.import_utils")
_sdpa = theirs("integrations.sdpa_attention").sdpa_attention_forward


def mask(**arguments: Any) -> Tensor | None:
    """What AttentionMaskInterface calls: each row's bounds, int32 [B, 1, 1, 2], or what `sdpa_mask` gives.

    Bounds are the place of the row's first key among those that attention will be given, and how many keys there are
    from it up to the last query's own. Where there is a window, a third column says how wide it is. Their four
    dimensions are what tells models that the mask is made already.
    """
    padding = arguments.get("attention_mask")
    window = _window_of(arguments.get("mask_function"))
    if window is None or "q_offset" not in arguments or not _has_bounds(padding, arguments):
        theirs: Tensor | None = _masks.sdpa_mask(**arguments)
        return theirs
    rows, device, kv_offset = arguments["batch_size"], arguments.get("device", "cpu"), arguments["kv_offset"]
    end = arguments["q_offset"] + arguments["q_length"] - kv_offset  # a tensor where the cache is static
    first = (
        torch.zeros(rows, dtype=torch.int64, device=device) if padding is None else _columns(arguments).int().argmax(1)
    )
    columns = [first, end - first, *([torch.full_like(first, window)] if window else [])]
    return torch.stack(columns, 1).to(torch.int32).view(rows, 1, 1, -1)


def _window_of(mask_function: Any) -> int | None:
    """How many keys a query sees by transformers' causal pattern, 0 for all; None for any other pattern."""
    if mask_function is _masks.causal_mask_function:
        return 0
    if _imports.is_tracing():
        return None
    parts: tuple[Any, ...] = _closed_over(mask_function, "mask_functions") or ()
    if len(parts) != 2 or parts[1] is not _masks.causal_mask_function:
        return None
    # Of the function that sliding_window_overlay makes, its name and its variable are all that tells of it.
    if not getattr(parts[0], "__qualname__", "").startswith("sliding_window_overlay."):
        return None
    width: int | None = _closed_over(parts[0], "sliding_window")
    return width


def _closed_over(function: Any, name: str) -> Any:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None


def _columns(arguments: dict[str, Any]) -> Tensor:
    """The padding mask [B, kv_length at most] of the keys that attention will be given."""
    kv_offset = arguments["kv_offset"]
    kept: Tensor = arguments["attention_mask"][:, kv_offset : kv_offset + arguments["kv_length"]]
    return kept.bool()


def _has_bounds(padding: Tensor | None, arguments: dict[str, Any]) -> bool:
    """Whether each row's keys follow one another. Only the host can choose, so this waits for the device once."""
    if padding is None:
        return True
    if _imports.is_tracing(padding) or padding.shape[:1] != (arguments["batch_size"],) or padding.dim() != 2:
        return False
    kept = _columns(arguments)
    begins = kept[:, 1:] & ~kept[:, :-1]
    return not bool((kept[:, :1].sum(1) + begins.sum(1) > 1).any())


def is_bounds(attention_mask: Any) -> bool:
    """Whether a layer's mask is what `mask` gives for rows with bounds."""
    return (
        isinstance(attention_mask, Tensor)
        and attention_mask.dtype == torch.int32
        and attention_mask.dim() == 4
        and attention_mask.shape[3] in (2, 3)
        and attention_mask.shape[1] == attention_mask.shape[2] == 1
    )


def expanded(bounds: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """The bounds as a mask for `sdpa`: bool [B, 1, S, L]."""
    first, length = bounds[..., :1], bounds[..., 1:2]
    key = torch.arange(num_keys, device=bounds.device)
    query = first + length - num_queries + torch.arange(num_queries, device=bounds.device).unsqueeze(1)
    seen = (key >= first) & (key <= query)
    return seen & (key > query - bounds[..., 2:]) if bounds.shape[3] > 2 else seen


def additive(attention_mask: Any, num_queries: int, num_keys: int, dtype: torch.dtype) -> Any:
    """A mask that was made for our attention, as transformers' `eager` adds it to the scores: [B, 1, S, L]."""
    if isinstance(attention_mask, Tensor) and not is_bounds(attention_mask) and attention_mask.dtype != torch.bool:
        return attention_mask  # one's own
    seen = attention_mask
    if seen is None or is_bounds(seen):
        seen = expanded(torch.tensor([[[[0, num_keys]]]]) if seen is None else seen, num_queries, num_keys)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What AttentionInterface calls: query [B, Hq, S, D], key and value [B, Hk, L, D] -> ([B, S, Hq, D], None).

    With gradients over whole sequences (S = L) by the training kernels; without, over the cache as it lies. `sdpa`
    computes what the kernels do not: dropout, biases, masks of one's own, float64, heads wider than 256, gradients
    through a cache. Raises TritiumError for what `sdpa` would leave out: a cap on the scores, and sinks.
    """
    for name, what in (("softcap", "a cap on attention scores"), ("s_aux", "attention sinks")):
        if kwargs.get(name) is not None:
            raise TritiumError(f'attn_implementation="tritium" has not {what} ({name}): take "eager"')
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if torch.is_autocast_enabled(query.device.type):  # as `sdpa` is told to
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    bounds = attention_mask if is_bounds(attention_mask) else None
    if not (
        _computable(query, key, value)
        and dropout == 0.0
        and kwargs.get("position_bias") is None
        and kwargs.get("cache") is None  # the one of transformers' continuous batching
        and _has_kernel(bounds, attention_mask, query.shape[2], key.shape[2], causal, sliding_window, trains)
    ):
        if bounds is not None:
            attention_mask = expanded(bounds, query.shape[2], key.shape[2])
        how = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        out, _ = _sdpa(module, query, key, value, attention_mask, **how)
        return out, None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    window = sliding_window if bounds is not None and bounds.shape[3] > 2 else None
    return (_whole if trains else _cached)(query, key, value, bounds, scale, window), None


def _computable(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernels take such heads."""
    return (
        query.dtype in DTYPES
        and key.dtype == value.dtype == query.dtype
        and key.shape == value.shape
        and query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3] <= WIDEST
        and query.shape[1] % key.shape[1] == 0
    )


def _has_kernel(
    bounds: Tensor | None,
    attention_mask: Tensor | None,
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    trains: bool,
) -> bool:
    """Whether the mask is one of the kernels' own."""
    if trains and queries != keys:
        return False
    if bounds is not None:
        return bounds.shape[3] == 2 or window is not None
    return attention_mask is None and causal and queries in (1, keys)


def _whole(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float, window: int | None
) -> Tensor:
    """Sequences that bring all their keys, with gradients. Padding before a row is a sequence of its own."""
    rows, _, length, _ = query.shape
    starts = torch.arange(rows, dtype=torch.int32, device=query.device) * length
    if bounds is not None:
        starts = torch.stack((starts, starts + bounds[:, 0, 0, 0]), 1).flatten()
    starts = torch.nn.functional.pad(starts, (0, 1), value=rows * length)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out: Tensor = DIFFERENTIABLE.attention(q, k, v, starts, scale, window)
    return out.unflatten(0, (rows, length))


def _cached(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor | None, scale: float, window: int | None
) -> Tensor:
    """Rows over keys that lie in a cache, or are new, as they are; no gradients."""
    if bounds is None:
        first = torch.zeros(len(query), dtype=torch.int32, device=query.device)
        lengths = torch.full_like(first, key.shape[2])
    else:
        first, lengths = bounds[:, 0, 0, 0], bounds[:, 0, 0, 1]
    return dense_attention(query.transpose(1, 2), key, value, first, lengths, scale, window)
