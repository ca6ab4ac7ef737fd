"""Attention over dense keys: its definition against loops and the packed one, the kernels by the rule, bits that depend
on nothing but the row, layouts."""

import pytest
import torch
from torch import Tensor
from tritium.kernels.attention import attention_reference, paged_attention
from tritium.kernels.decode_attention import decode_attention
from tritium.kernels.dense_attention import PAGE, dense_attention, dense_attention_reference

from ..rule import DEVICE, DTYPES, assert_rule, draw, needs_gpu, same_bits, truth_of

pytestmark = pytest.mark.usefixtures("poisoned")
F64 = torch.float64
NAN = float("nan")


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def inputs(
    rows: int, queries: int, room: int, heads: int = 4, kv_heads: int = 2, head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q as a model's transposed view has it, k and v as its cache has them."""
    q = draw(rows, queries, heads, head_dim, dtype=dtype, scale=2.0)
    k, v = (draw(rows, kv_heads, room, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    return q, k, v


def hidden(x: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    """The same keys with NaN wherever no row's own key lies."""
    x = x.clone()
    for row, (begin, count) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
        x[row, :, :begin] = NAN
        x[row, :, begin + max(0, count) :] = NAN
    return x


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_the_definition_is_attention_over_each_rows_own_keys(window: int | None) -> None:
    """The last queries of a packed sequence of the row's keys; queries before its first key give 0."""
    q, k, v = inputs(3, 4, 11, dtype=F64)
    first, lengths = ints(0, 3, 5), ints(11, 6, 2)
    got = dense_attention_reference(
        q, hidden(k, first, lengths), hidden(v, first, lengths), first, lengths, 0.25, window
    )
    for row, (begin, count) in enumerate([(0, 11), (3, 6), (5, 2)]):
        seeing = min(4, count)
        keys, values = (x[row, :, begin : begin + count].transpose(0, 1) for x in (k, v))
        queries = torch.cat((draw(count - seeing, 4, 16, dtype=F64, seed=9), q[row, 4 - seeing :]))
        expected = attention_reference(queries, keys, values, [0, count], 0.25, window)[count - seeing :]
        torch.testing.assert_close(got[row, 4 - seeing :], expected, rtol=0, atol=1e-12)
        assert got[row, : 4 - seeing].eq(0).all()


def check(
    first: Tensor, lengths: Tensor, queries: int, room: int, window: int | None = None, heads: int = 4,
    kv_heads: int = 2, head_dim: int = 16, dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    q, k, v = inputs(len(first), queries, room, heads, kv_heads, head_dim, dtype)
    args = (q, hidden(k, first, lengths), hidden(v, first, lengths), first, lengths, head_dim**-0.5, window)
    expected, truth = dense_attention_reference(*args), truth_of(dense_attention_reference, *args)
    assert_rule(dense_attention(*args), expected, truth, f"{first.tolist()} {lengths.tolist()} S {queries} {window}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("queries", [1, 5])
def test_rule(queries: int, dtype: torch.dtype) -> None:
    """Padding on either side, rows of a few keys, one of none, more queries than keys; windows. NaN lies in between."""
    for window in (None, 2):
        check(ints(0, 4, 7, 2), ints(9, 5, 1, 0), queries, 9, window, dtype=dtype)
    check(ints(3), ints(-2), queries, 9, dtype=dtype)


@pytest.mark.parametrize("queries", [1, 3])
def test_rule_over_pages(queries: int) -> None:
    """More keys than a page, which begin off its border; a window that crosses one."""
    for window in (None, 40):
        check(ints(5, 250), ints(PAGE + 20, 30), queries, PAGE + 30, window, heads=2, kv_heads=1)


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 56, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("window", [None, 1, 255, 1000])
@pytest.mark.parametrize("queries", [1, 2, 130, 700])
def test_rule_in_full(queries: int, window: int | None, head_dim: int, dtype: torch.dtype) -> None:
    options = {"head_dim": head_dim, "dtype": dtype}
    for heads, kv_heads in ((2, 2), (8, 2), (16, 1)):
        check(
            ints(0, 1, 299, 600, 1), ints(1300, 1001, 1001, 257, 1), queries, 1300, window, heads, kv_heads, **options
        )


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("window", [None, 3])
def test_a_padded_row_has_the_bits_of_the_row_alone(queries: int, window: int | None) -> None:
    """Neither padding, nor room behind, nor the batch, nor a paged cache changes a bit."""
    q, k, v = inputs(3, queries, 300, heads=2, kv_heads=1)
    first, lengths = ints(0, 7, 31), ints(300, 260, 18)
    columns = torch.stack((first, lengths, first), 1).T[:2]  # as a mask brings them
    got = dense_attention(q, hidden(k, first, lengths), hidden(v, first, lengths), *columns, 0.25, window)
    for row, (begin, count) in enumerate([(0, 300), (7, 260), (31, 18)]):
        keys, values = (x[row : row + 1, :, begin : begin + count].contiguous() for x in (k, v))
        alone = dense_attention(q[row : row + 1], keys, values, ints(0), ints(count), 0.25, window)
        assert same_bits(got[row], alone[0])
        pages = [
            torch.nn.functional.pad(x[0], (0, 0, 0, 2 * PAGE - count)).unflatten(1, (2, PAGE)) for x in (keys, values)
        ]
        table = ints(0, 1).unsqueeze(0)
        if queries == 1:
            paged = decode_attention(q[row], *pages, table, ints(count), 0.25, window)
        else:
            paged = paged_attention(q[row], *pages, table, ints(0, queries), ints(count), 0.25, window)
        assert same_bits(got[row], paged)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """[B, Hk, L, D] as models have it."""
    padded = torch.nn.functional.pad(x, (0, 0, 2, 3), value=NAN)
    return {
        "tokens first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "a slice of a longer cache": padded[:, :, 2:-3],
        "a slice of a packed projection": torch.cat((x, x, x), 1)
        .transpose(1, 2)
        .contiguous()[:, :, 2:4]
        .transpose(1, 2),
        "widths apart": torch.cat((x, x), 3)[..., : x.shape[3]],
        "rows at odd places": torch.nn.functional.pad(x.flatten(1), (0, 5)).as_strided(
            x.shape, (x.stride(0) + 5, *x.stride()[1:])
        ),
        "width strided": x.repeat_interleave(2, 3)[..., ::2],
    }


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("layout", sorted(layouts(torch.zeros(2, 2, 4, 16))))
def test_layouts(layout: str, queries: int) -> None:
    q, k, v = inputs(2, queries, 9)
    first, lengths = ints(0, 4), ints(9, 4)
    expected = dense_attention(q, k, v, first, lengths, 0.25)
    strided = torch.stack((first, lengths, first), 1)  # as a mask brings them
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(dense_attention(q, layouts(k)[layout], layouts(v)[layout], *strided.T[:2], 0.25), expected)
    assert same_bits(dense_attention(q, layouts(k)[layout], v, first, lengths, 0.25), expected)


def test_one_key_and_nothing() -> None:
    q, k, v = inputs(2, 1, 1)
    got = dense_attention(q, k, v, ints(0, 0), ints(1, 0), 0.25)
    assert torch.equal(got[0, 0], v[0, :, 0].repeat_interleave(2, 0))
    assert got[1].eq(0).all()
    assert dense_attention(q, k[:, :, :0], v[:, :, :0], ints(0, 0), ints(0, 0), 0.25).eq(0).all()
    assert dense_attention(q[:0], k[:0], v[:0], ints(), ints(), 0.25).shape == (0, 1, 4, 16)


def test_what_does_not_fit() -> None:
    q, k, v = inputs(2, 1, 3)
    one, good = ints(3, 3), ints(0, 0)
    with pytest.raises(ValueError, match="q must be"):
        dense_attention(q, k[:1], v[:1], good, one, 0.25)
    with pytest.raises(TypeError, match="one dtype"):
        dense_attention(q, k.half(), v.half(), good, one, 0.25)
    with pytest.raises(ValueError, match="multiple of the key/value heads"):
        dense_attention(q[:, :, :3], k, v, good, one, 0.25)
    with pytest.raises(ValueError, match=r"lengths must be \[2\] int32"):
        dense_attention(q, k, v, good, one.long(), 0.25)
    with pytest.raises(ValueError, match="row 1 has 3 keys from 1 on, and there is room for 3"):
        dense_attention_reference(q, k, v, [0, 1], one, 0.25)
    with pytest.raises(ValueError, match="a window of 0"):
        dense_attention(q, k, v, good, one, 0.25, 0)


def test_the_registered_operation() -> None:
    q, k, v = inputs(2, 3, 6)
    first, lengths = ints(0, 2), ints(6, 4)
    torch.library.opcheck(torch.ops.tritium.dense_attention.default, (q, k, v, first, lengths, 0.25, 4))
