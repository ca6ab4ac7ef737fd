"""The sampling kernel: tokens against the float64 truth, ties, cuts, what is not a number, batch invariance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.kernels import sampling
from tritium.kernels.sampling import sample, sample_reference, sample_scratch

from ..rule import DEVICE, DTYPES, draw, needs_gpu, same_bits

pytestmark = pytest.mark.usefixtures("poisoned")
TOP = 1 - 2.0**-24  # the largest uniform number there is
SMALL = {"CHUNK": 64, "BITS": 8, "num_warps": 4}  # many chunks of a small vocabulary, few passes
INF, NAN = math.inf, math.nan
WIDTHS = [1, 2, 31, 63, 64, 65, 131]
SETTINGS = [
    (1.0, 0, 1.0),
    (0.7, 5, 1.0),
    (1.3, 0, 0.9),
    (0.8, 20, 0.8),
    (1.0, 2, 0.6),
    (1e3, 40, 0.37),
    (1e-6, 0, 0.5),
    (2.0, 10**6, 1e-9),
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Another configuration than the tables': it may not matter, and it is cheaper to interpret."""
    config = dict(SMALL)
    monkeypatch.setattr(sampling.tuning, "config", lambda *args, **key: config)
    return config


def uniforms(count: int, seed: int = 0) -> Tensor:
    """The smallest, the largest, and numbers between."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(count, generator=generator)
    numbers[:1], numbers[1:2] = 0.0, TOP
    return numbers.to(DEVICE)


def acceptable(row: Tensor, temperature: float, top_k: int, top_p: float, u: float) -> set[int]:
    """The tokens in whose share of the truth u lies, or from which it is at most 1e-5 away.

    Where rounding could move the cut of top_p, either cut is taken.
    """
    ordered, tokens = row.double().cpu().sort(descending=True, stable=True)
    weights = ((ordered - ordered[0]) / temperature).exp()
    if top_k:
        weights = weights[:top_k]
    weights = weights / weights.sum()
    found = set()
    for limit in {top_p, top_p * (1 - 2e-6), top_p * (1 + 2e-6)} if top_p < 1 else {1.0}:
        before = weights.cumsum(0) - weights
        kept = weights[: max(1, int((before < limit).sum()))] if top_p < 1 else weights
        kept = kept / kept.sum()
        end = kept.cumsum(0)
        near = (end - kept <= u + 1e-5) & (end >= u - 1e-5) & (kept > 0)
        found |= set(tokens[: kept.numel()][near].tolist())
    return found


def check(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> Tensor:
    got = sample(logits, temperature, top_k, top_p, uniform)
    assert got.dtype == torch.int64
    assert got.shape == logits.shape[:1]
    truth = sample_reference(logits.double(), temperature, top_k, top_p, uniform.double())
    for row, (token, expected) in enumerate(zip(got.tolist(), truth.tolist(), strict=True)):
        if token != expected:
            allowed = acceptable(logits[row], temperature, top_k, top_p, float(uniform[row]))
            assert token in allowed, f"row {row}: {token}, truth {expected}, u {float(uniform[row])}, allowed {allowed}"
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_tokens(temperature: float, top_k: int, top_p: float, dtype: torch.dtype, small: dict[str, int]) -> None:
    """Every pass, at a vocabulary of one, one off a chunk, and of several chunks."""
    which = 3 * SETTINGS.index((temperature, top_k, top_p)) + DTYPES.index(dtype)
    for width in WIDTHS if DEVICE == "cuda" else (WIDTHS[which % len(WIDTHS)],):
        logits = draw(4, width, dtype=dtype, seed=width, scale=3.0)
        rows = slice(None) if DEVICE == "cuda" else slice(which % 2, 4, 2)  # with the smallest number, or the largest
        check(logits[rows], temperature, top_k, top_p, uniforms(4, width)[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_random_cases(dtype: torch.dtype, small: dict[str, int]) -> None:
    """Anything with anything: ties, forbidden tokens, every kind of cut and temperature."""
    generator = torch.Generator().manual_seed(DTYPES.index(dtype))

    def one_of(values: list[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for seed in range(400 if DEVICE == "cuda" else 5):
        width = one_of([2, 17, 63, 64, 65, 128, 150])
        logits = draw(2, width, dtype=dtype, seed=seed, scale=one_of([0.1, 2.0, 10.0]))
        if one_of([True, False]):
            logits = (logits / 2).round() * 2  # many ties, zeros of both signs
        if one_of([True, False]):
            logits = logits.masked_fill(draw(2, width, dtype=torch.float32, seed=seed + 500) < 0.5, -INF)
            logits[:, one_of([0, width - 1])] = 0.25
        numbers = torch.rand(2, generator=generator).to(DEVICE)
        check(
            logits,
            one_of([1e-6, 0.3, 1.0, 1.0, 3.0, 1e3]),
            one_of([0, 0, 2, 7, width - 1, width, width + 1]),
            one_of([1e-9, 0.123, 0.6, 0.95, 0.999, 1.0, 1.0]),
            numbers,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [1, 9])
def test_the_configurations_of_the_tables(rows: int, dtype: torch.dtype) -> None:
    """Around a chunk's end in both rows of the table; a row's token is the one it has under the other."""
    chunk = sampling.tuning.config("sampling", torch.device(DEVICE), rows=rows, itemsize=dtype.itemsize)["CHUNK"]
    args = (1.0, 0, 1.0) if dtype == torch.float32 else (1.0, 0, 0.9)
    for width in (chunk - 1, chunk, chunk + 1, 2 * chunk + 3) if DEVICE == "cuda" else (chunk + 1,):
        logits, numbers = draw(rows, width, dtype=dtype, seed=width, scale=2.0), uniforms(rows)
        logits[0, -1] = 15.0  # the last token must be within reach
        got = check(logits, *args, numbers)
        assert got[0] == width - 1
        if rows > 1:
            assert same_bits(sample(logits[-1:], *args, numbers[-1:]), got[-1:])


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_whole_vocabularies(temperature: float, top_k: int, top_p: float, dtype: torch.dtype) -> None:
    for rows, width in ((1, 151936), (64, 151936), (5, 50257)):
        check(draw(rows, width, dtype=dtype, scale=3.0), temperature, top_k, top_p, uniforms(rows))


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_race(dtype: torch.dtype) -> None:
    """200 times the same tokens: sums of integers do not mind the order in which they are gathered."""
    logits, numbers = draw(32, 151936, dtype=dtype, scale=2.0), uniforms(32)
    first = sample(logits, 0.9, 5000, 0.95, numbers)
    for _ in range(200):
        assert same_bits(sample(logits, 0.9, 5000, 0.95, numbers), first)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(3, torch.float16), (4, torch.float32), (5, torch.float32), (6, torch.bfloat16)]
)
def test_the_digits_do_not_matter(bits: int, dtype: torch.dtype, small: dict[str, int]) -> None:
    """Also digits that do not divide the key's width: the first is then a shorter one."""
    logits, numbers = draw(1, 65, dtype=dtype, scale=3.0), uniforms(3)[2:]
    expected = check(logits, 1.2, 9, 0.9, numbers)
    small["BITS"] = bits
    assert same_bits(sample(logits, 1.2, 9, 0.9, numbers), expected)


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.3, 0, 0.9), (0.8, 6, 1.0)])
def test_frequencies_are_exact(temperature: float, top_k: int, top_p: float, small: dict[str, int]) -> None:
    """Of n evenly spread numbers each token gets its share, to one number: the truncated distribution itself."""
    count = 10000 if DEVICE == "cuda" else 30
    row = draw(1, 12, dtype=torch.bfloat16, scale=1.5)
    numbers = ((torch.arange(count, dtype=torch.float64) + 0.5) / count).float().to(DEVICE)
    got = sample(row.expand(count, -1), temperature, top_k, top_p, numbers)
    logits = row[0].double().cpu()
    weights = (logits / temperature).exp()
    order = logits.argsort(descending=True, stable=True)
    order = order[: top_k or None]
    shares = weights[order] / weights[order].sum()
    order = order[: int((shares.cumsum(0) < top_p - 1e-12).sum()) + 1]
    expected = torch.zeros(12, dtype=torch.float64)
    expected[order] = weights[order] / weights[order].sum()
    assert 3 < order.numel() < 12
    counts = torch.bincount(got.cpu(), minlength=12)
    assert ((counts - count * expected).abs() <= 1).all()
    # Likeliest first: the same tokens in the definition's order, not merely as often.
    assert same_bits(got, sample_reference(row.expand(count, -1).double(), temperature, top_k, top_p, numbers.double()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_smaller_id(dtype: torch.dtype, small: dict[str, int]) -> None:
    """Equal logits over three chunks: u counts through them, top_k and top_p cut through them at the same place."""
    logits = torch.zeros(1, 160, dtype=dtype, device=DEVICE)
    logits[:, 1::2] = -0.0  # a zero is a zero
    cases = (
        (0.0, 0, 1.0, 0),
        (0.4, 0, 1.0, 64),  # 0.4 in float32 is a little more, and 64 of 160 are not
        (0.39999, 0, 1.0, 63),
        (TOP, 0, 1.0, 159),
        (TOP, 100, 1.0, 99),
        (TOP, 0, 0.5, 79),
        (0.5, 128, 0.5, 32),  # half of 64: the boundary itself goes to the next
        (TOP, 128, 0.501, 64),
    )
    # In the interpreter each dtype takes its third of them.
    for number, top_k, top_p, token in cases if DEVICE == "cuda" else cases[DTYPES.index(dtype) :: 3]:
        got = sample(logits, 1.0, top_k, top_p, torch.tensor([number], device=DEVICE))
        assert got.tolist() == [token], (number, top_k, top_p)
    assert sample(logits, 0, 0, 1.0, None).tolist() == [0]
    # The cut falls among ties that are not the likeliest: 0 above, then 70 alike from the second chunk on.
    logits = torch.full((1, 160), -8.0, dtype=dtype, device=DEVICE)
    logits[:, 90:] = 1.0
    logits[:, 3] = 2.0
    numbers = torch.tensor([TOP], device=DEVICE)
    assert sample(logits, 1.0, 41, 1.0, numbers).tolist() == [129]
    assert sample(logits, 1.0, 2, 1.0, numbers).tolist() == [90]
    assert sample(logits, 1.0, 41, 0.5, numbers).tolist() == check(logits, 1.0, 41, 0.5, numbers).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_forbidden_tokens_are_never_taken(dtype: torch.dtype, small: dict[str, int]) -> None:
    """Even where more are to be kept than are allowed, and at temperatures at which nothing is left of a difference."""
    logits = torch.full((2, 130), -INF, dtype=dtype, device=DEVICE)
    logits[:, 3], logits[:, 129] = 0.0, 1.0
    numbers = torch.tensor([0.0, TOP], device=DEVICE)
    cases = ((1.0, 50, 0.999999), (1e3, 129, 0.9), (1e39, 0, 1.0), (1e300, 5, 1.0), (1.0, 0, 1.0))
    for temperature, top_k, top_p in cases if DEVICE == "cuda" else cases[DTYPES.index(dtype) :: 3]:
        assert sample(logits, temperature, top_k, top_p, numbers).tolist() == [129, 3]
        assert sample_reference(logits, temperature, top_k, top_p, numbers).tolist() == [129, 3]
    for temperature in (1e-6, 1e-40, 5e-324) if DEVICE == "cuda" else (5e-324,):
        assert sample(logits, temperature, 0, 1.0, numbers).tolist() == [129, 129]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_what_is_not_a_number(temperature: float, dtype: torch.dtype, small: dict[str, int]) -> None:
    """A NaN of either sign anywhere gives -1 and nothing elsewhere; infinite rows give the first of their largest."""
    logits = draw(8, 65, dtype=dtype, scale=2.0)
    numbers = uniforms(8) if temperature else None
    cuts = (9, 0.9) if dtype == torch.bfloat16 else (0, 1.0)
    clean = sample(logits, temperature, *cuts, numbers)
    bad = logits.clone()
    bad[0, 0] = NAN
    bad[2, 64] = -torch.tensor(NAN)
    bad[3] = NAN
    bad[4, 0], bad[4, 5] = INF, NAN
    bad[5, 63], bad[5, 64] = INF, INF
    bad[6] = -INF
    expected = clean.clone()
    expected[[0, 2, 3, 4]] = -1
    expected[5], expected[6] = 63, 0
    assert sample(bad, temperature, *cuts, numbers).tolist() == expected.tolist()
    assert sample_reference(bad, temperature, *cuts, numbers).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy(dtype: torch.dtype) -> None:
    """The first maximum, whatever else is asked; top_k = 1 is the same with any number."""
    logits = draw(3, 5000, dtype=dtype, scale=1.0).round()
    expected = sample_reference(logits, 0, 0, 1.0, None)
    assert same_bits(sample(logits, 0.0, 0, 1.0, None), expected)
    assert same_bits(sample(logits, 0, 7, 0.3, uniforms(3)), expected)
    assert same_bits(sample(logits, 2.0, 1, 0.9, uniforms(3)), expected)
    limits = torch.finfo(dtype)
    extremes = torch.tensor([[limits.min, -1.0, limits.max, limits.tiny]], dtype=dtype, device=DEVICE)
    for sign, token in ((1, 2), (-1, 0)):
        assert sample(sign * extremes, 0, 0, 1.0, None).tolist() == [token]
        assert sample(sign * extremes, 1.0, 0, 1.0, uniforms(2)[1:]).tolist() == [token]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_invariance(dtype: torch.dtype, small: dict[str, int]) -> None:
    """A row's token: alone, among 1 to 17, at another place, beside NaN."""
    logits, numbers = draw(17, 64, dtype=dtype, scale=2.0), uniforms(17)
    args = (1.1, 0, 1.0)
    whole = check(logits, *args, numbers)
    assert whole.unique().numel() > 5
    for rows in range(1, 18) if DEVICE == "cuda" else (1, 3):
        assert same_bits(sample(logits[:rows], *args, numbers[:rows]), whole[:rows])
    order = torch.randperm(17, generator=torch.Generator().manual_seed(2)).to(DEVICE)[: 17 if DEVICE == "cuda" else 3]
    assert same_bits(sample(logits[order], *args, numbers[order]), whole[order])
    poisoned = torch.full_like(logits, NAN)[:3]
    poisoned[1] = logits[8]
    assert sample(poisoned, *args, numbers[7:10]).tolist() == [-1, whole[8].item(), -1]
    for rows in range(1, 18) if DEVICE == "cuda" or dtype == torch.bfloat16 else (17,):
        assert same_bits(sample(logits[:rows], 0, 0, 1.0, None), sample_reference(logits[:rows], 0, 0, 1.0, None))


def test_views_and_empty_input(small: dict[str, int]) -> None:
    """Strided rows and numbers, a transposed vocabulary, no rows; nothing is overwritten."""
    storage, numbers = draw(6, 160, dtype=torch.bfloat16, scale=2.0), uniforms(9).reshape(3, 3)
    before, numbers_before = storage.clone(), numbers.clone()
    for logits in (storage[::2, 20:85], storage[:, ::53].t()[:3]):
        for column in (numbers[:, 2], numbers[2]):
            expected = check(logits.contiguous(), 5.0, 60, 0.99, column.contiguous())
            assert same_bits(sample(logits, 5.0, 60, 0.99, column), expected)
    assert same_bits(storage, before)
    assert same_bits(numbers, numbers_before)
    assert sample(storage[:0], 0.9, 3, 0.9, numbers[0, :0]).shape == (0,)
    assert sample(storage[:0], 0, 0, 1.0, None).dtype == torch.int64


def test_rows_beyond_int32_offsets(small: dict[str, int]) -> None:
    """Rows whose last is more than 2^31 elements from the first, though one stride is not: int32 would wrap."""
    apart = 2**30 + 2**20
    torch.use_deterministic_algorithms(False)  # host memory of which only the pages that are written are ever there
    storage = torch.empty(2 * apart + 100, dtype=torch.float16, device=DEVICE)
    logits = storage.as_strided((3, 100), (apart, 1))
    logits.copy_(draw(3, 100, dtype=torch.float16, scale=2.0))
    numbers = torch.tensor([0.1, 0.5, 0.9], device=DEVICE)
    for args in ((1.0, 9, 0.9, numbers), (0.0, 0, 1.0, None)):
        assert same_bits(sample(logits, *args), sample(logits.contiguous(), *args))


@pytest.mark.parametrize(("top_k", "top_p"), [(-3, 1.0), (0, 0.0), (0, -1.0), (0, 1.5), (0, float("nan"))])
def test_refuses_settings_without_meaning(top_k: int, top_p: float) -> None:
    with pytest.raises(ValueError, match="top_k must be 0 or more and top_p above 0 and at most 1"):
        sample(draw(2, 5, dtype=torch.float32), 1.0, top_k, top_p, torch.rand(2, device=DEVICE))


def test_the_number_of_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the docstring states, without the one that zeroes the sums: one a pass and one to take the token."""
    launches: list[int] = []
    monkeypatch.setattr(sampling, "launch", lambda *args, **options: launches.append(1))
    for dtype, temperature, top_k, top_p, expected in (
        (torch.bfloat16, 0.0, 0, 1.0, 2),
        (torch.bfloat16, 1.0, 1, 0.5, 2),
        (torch.bfloat16, 1.0, 0, 1.0, 6),
        (torch.bfloat16, 1.0, 100, 1.0, 6),
        (torch.float16, 1.0, 0, 0.9, 9),
        (torch.float16, 1.0, 99, 0.9, 12),
        (torch.float32, 1.0, 99, 0.9, 24),
    ):
        launches.clear()
        sample(draw(2, 100, dtype=dtype), temperature, top_k, top_p, uniforms(2))
        assert len(launches) == expected, (dtype, temperature, top_k, top_p)


def test_refuses_what_does_not_fit() -> None:
    logits, numbers = draw(2, 64, dtype=torch.float32), uniforms(2)
    with pytest.raises(TypeError, match="float64"):
        sample(logits.double(), 1.0, 0, 1.0, numbers)
    with pytest.raises(ValueError, match=r"logits must be \[rows, vocabulary\]"):
        sample(logits[0], 1.0, 0, 1.0, numbers)
    with pytest.raises(ValueError, match="at least one token"):
        sample(logits[:, :0], 1.0, 0, 1.0, numbers)
    with pytest.raises(ValueError, match="one uniform number a row"):
        sample(logits, 1.0, 0, 1.0, None)
    with pytest.raises(ValueError, match=r"uniform must be \[2\] torch.float32"):
        sample(logits, 1.0, 0, 1.0, numbers[:1])
    with pytest.raises(ValueError, match=r"uniform must be \[2\] torch.float32"):
        sample(logits, 1.0, 0, 1.0, numbers.double())
    for temperature in (-1.0, NAN):
        with pytest.raises(ValueError, match="temperature must be 0 or more"):
            sample(logits, temperature, 0, 1.0, numbers)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_registered(temperature: float, small: dict[str, int]) -> None:
    logits = draw(2, 70, dtype=torch.float32, scale=2.0)
    args = (logits, temperature, 5, 0.9, uniforms(2) if temperature else None)
    torch.library.opcheck(torch.ops.tritium.sample, args)
    compiled = torch.compile(lambda *inputs: torch.ops.tritium.sample(*inputs), fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(*args), sample(*args))


@pytest.mark.parametrize("how", [(0.0, 0, 1.0), (0.8, 5, 0.9)], ids=str)
@pytest.mark.usefixtures("poisoned")
def test_what_was_begun_goes_on_in_the_scratch(how: tuple[float, int, float]) -> None:
    """The same tokens as without, at the first and at the second use; with the largest keys put there by the caller."""
    uniform = torch.tensor([0.2, 0.9], device=DEVICE)
    scratch, out = None, torch.empty(2, dtype=torch.int64, device=DEVICE)
    for seed in (1, 2):
        logits = draw(2, 300, dtype=torch.bfloat16, seed=seed, scale=3.0)
        expected = sample(logits, *how, uniform)
        scratch = scratch or sample_scratch(logits, *how)
        assert sample(logits, *how, uniform, out=out, scratch=scratch) is out
        assert torch.equal(out, expected)
        best = scratch.work[:, 0].clone()
        assert torch.equal(0x7FFFFFFF - (best & 0x7FFFFFFF), logits.float().argmax(-1))
        scratch.work.zero_()
        scratch.work[:, 0] = best
        assert torch.equal(sample(logits, *how, uniform, scratch=scratch, begun=True), expected)
    with pytest.raises(ValueError, match="give it"):
        sample(logits, *how, uniform, begun=True)
    with pytest.raises(ValueError, match=r"out must be \[2\] torch.int64"):
        sample(logits, *how, uniform, out=out[:1])
