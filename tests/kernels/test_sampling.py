"""Philox against its published answers, and sampling against the exact distribution."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from tritium.kernels.sampling import philox_uniform_reference, sample_reference

WORD = 0xFFFFFFFF
TOP = 1 - 2.0**-24  # the largest uniform number there is


# Philox.


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int = 10) -> tuple[int, ...]:
    """The whole cipher on Python's own integers, from the paper's figure."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (right >> 32) ^ c1 ^ k0, right & WORD, (left >> 32) ^ c3 ^ k1, left & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def expected_uniform(seed: int, step: int) -> float:
    word = philox4x32((step & WORD, (step >> 32) & WORD, 0, 0), (seed & WORD, (seed >> 32) & WORD))[0]
    return (word >> 8) / 2.0**24


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_cipher_of_this_file_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    """Random123's kat_vectors for philox4x32-10: without them the other tests would compare two guesses."""
    assert philox4x32(counter, key) == answer


def test_philox_first_number() -> None:
    """Seed 0, step 0: the first 24 bits of 0x6627e8d5."""
    assert philox_uniform_reference(torch.tensor(0), torch.tensor(0)).item() == 0x6627E8 / 2.0**24


@settings(deadline=None, max_examples=200)
@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**63 - 1))
def test_philox_is_the_cipher(seed: int, step: int) -> None:
    """Any int64 seed, negative and beyond 32 bits: a sign that leaks or a carry that is lost would show."""
    got = philox_uniform_reference(torch.tensor(seed), torch.tensor(step))
    assert got.dtype == torch.float32
    assert got.item() == expected_uniform(seed, step)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**62, -(2**63), 2**63 - 1])
def test_philox_seeds_at_the_edges(seed: int) -> None:
    """Broadcast over steps, among them the carry into the second counter word."""
    steps = [0, 1, 2, 2**31, 2**32 - 1, 2**32, 2**40 + 7]
    got = philox_uniform_reference(torch.tensor([[seed], [5]]), torch.tensor(steps))
    assert got.shape == (2, len(steps))
    assert got.tolist() == [[expected_uniform(s, step) for step in steps] for s in (seed, 5)]


def test_philox_does_not_depend_on_what_else_is_drawn() -> None:
    """A row alone, in a batch, or in another order draws the same numbers; no numbers are none."""
    seeds, steps = torch.tensor([7, -3, 2**40]).unsqueeze(1), torch.arange(9)
    together = philox_uniform_reference(seeds, steps)
    for row in range(3):
        assert torch.equal(philox_uniform_reference(seeds[row], steps), together[row])
    assert torch.equal(philox_uniform_reference(seeds, steps.flip(0)), together.flip(1))
    assert philox_uniform_reference(seeds, steps[:0]).shape == (3, 0)


def test_philox_is_roughly_uniform_and_below_one() -> None:
    """16 bins, mean, and neighbouring steps and seeds uncorrelated."""
    numbers = philox_uniform_reference(torch.arange(200).unsqueeze(1), torch.arange(500)).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert abs(numbers.mean().item() - 0.5) < 0.004  # 4 standard errors
    counts = torch.histc(numbers, 16, 0, 1)
    chi_squared = ((counts - 6250) ** 2 / 6250).sum().item()
    assert 2 < chi_squared < 45  # 15 degrees of freedom: 1e-4 on either side
    for a, b in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(correlation) < 0.015
    assert numbers.unique().numel() > 0.995 * numbers.numel()


# Sampling.


def truncated(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The exact distribution, by the docstring's words, in Python's own float64."""
    top = max(logits)
    weights = [math.exp((value - top) / temperature) for value in logits]
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k:
        order = order[:top_k]
    total = math.fsum(weights[token] for token in order)
    kept, reached = [], 0.0
    for token in order:
        kept.append(token)
        reached += weights[token] / total
        if reached >= top_p:
            break
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


def grid(count: int) -> Tensor:
    """Evenly spread numbers in (0, 1)."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def draws(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor) -> list[float]:
    """How often each token is chosen, when one row of logits meets every uniform number."""
    tokens = sample_reference(logits.expand(uniform.numel(), -1), temperature, top_k, top_p, uniform)
    counts = Counter(tokens.tolist())
    return [counts[token] / uniform.numel() for token in range(logits.numel())]


SETTINGS = [
    (1.0, 0, 1.0),
    (0.6, 0, 1.0),
    (1.7, 0, 0.9),
    (0.7, 5, 1.0),
    (1.0, 5, 0.8),
    (0.6, 20, 0.95),
    (2.5, 3, 0.5),
    (1.0, 1, 1.0),
    (1.0, 100, 0.3),
    (0.05, 0, 0.99),
]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_frequencies_are_the_exact_truncated_distribution(
    temperature: float, top_k: int, top_p: float, dtype: torch.dtype
) -> None:
    """Over 20000 evenly spread numbers each token's share is its probability to one part in 20000.

    top_p before top_k, without renormalising, or with the crossing token dropped: each would show.
    """
    torch.manual_seed(0)
    logits = (2 * torch.randn(24)).to(dtype)
    expected = truncated(logits.double().tolist(), temperature, top_k, top_p)
    got = draws(logits, temperature, top_k, top_p, grid(20000))
    assert got == pytest.approx(expected, abs=1.5 / 20000)


def test_frequencies_with_philox() -> None:
    """The two halves together, within five standard errors."""
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5])
    uniform = philox_uniform_reference(torch.tensor(1234), torch.arange(20000))
    for token, (share, p) in enumerate(
        zip(draws(logits, 0.8, 0, 0.95, uniform), truncated(logits.tolist(), 0.8, 0, 0.95), strict=True)
    ):
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / 20000), token


def test_likelier_tokens_come_first() -> None:
    """The order is part of the definition: a kernel must find the same token for the same number."""
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=torch.float64).log()
    uniform = torch.tensor([0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, TOP], dtype=torch.float64)
    got = sample_reference(logits.expand(8, 4), 1.0, 0, 1.0, uniform)
    assert got.tolist() == [1, 1, 3, 3, 2, 2, 0, 0]


def test_the_first_token_whose_cumulative_probability_exceeds_u() -> None:
    """At the boundary itself the next token is chosen."""
    logits = torch.zeros(1, 4, dtype=torch.float64)
    for uniform, token in ((0.25, 1), (0.5, 2), (0.75, 3), (0.2499, 0)):
        assert sample_reference(logits, 1.0, 0, 1.0, torch.tensor([uniform])).item() == token


def test_top_p_keeps_the_shortest_prefix_that_reaches_it() -> None:
    """Reached exactly is reached; a hair more keeps one more."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    for top_p, kept in ((0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.76, {0, 1, 2}), (0.876, {0, 1, 2, 3})):
        got = sample_reference(logits.expand(1000, 4), 1.0, 0, top_p, grid(1000))
        assert set(got.tolist()) == kept, top_p


def test_top_p_counts_probability_after_top_k() -> None:
    """Of four equal tokens, k = 2 leaves halves, and p = 0.5 then leaves one."""
    logits = torch.zeros(4, dtype=torch.float64)
    assert set(sample_reference(logits.expand(100, 4), 1.0, 2, 0.5, grid(100)).tolist()) == {0}
    assert set(sample_reference(logits.expand(100, 4), 1.0, 2, 0.51, grid(100)).tolist()) == {0, 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_the_smallest_and_largest_uniform(dtype: torch.dtype, temperature: float, top_k: int, top_p: float) -> None:
    """u = 0 takes the likeliest token; the largest u the last one kept, never one cut off or beyond the end."""
    torch.manual_seed(1)
    logits = (2 * torch.randn(3, 40)).to(dtype)
    low = sample_reference(logits, temperature, top_k, top_p, torch.zeros(3))
    assert torch.equal(low, logits.argmax(-1))
    high = sample_reference(logits, temperature, top_k, top_p, torch.full((3,), TOP))
    for row, token in zip(logits.double().tolist(), high.tolist(), strict=True):
        assert truncated(row, temperature, top_k, top_p)[token] > 0


def test_the_largest_uniform_over_a_whole_vocabulary() -> None:
    """151936 float32 probabilities do not add up to exactly one: the choice must still be a token."""
    torch.manual_seed(2)
    for logits in (torch.zeros(2, 151936), torch.randn(2, 151936) * 3):
        for top_p in (1.0, 0.9):
            got = sample_reference(logits, 1.0, 0, top_p, torch.full((2,), TOP))
            assert ((got >= 0) & (got < 151936)).all()
    assert sample_reference(torch.zeros(1, 151936), 1.0, 0, 1.0, torch.tensor([TOP])).item() > 151900


def test_greedy_is_the_first_maximum_and_needs_no_number() -> None:
    """Temperature 0 ignores top_k and top_p; ties go to the smaller id; sampling without a number is refused."""
    logits = torch.tensor([[0.0, 3.0, 3.0], [2.0, 1.0, 2.0], [-math.inf, -5.0, -math.inf]])
    got = sample_reference(logits, 0, 2, 0.1, None)
    assert got.dtype == torch.int64
    assert got.tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="uniform"):
        sample_reference(logits, 0.5, 0, 1.0, None)


@pytest.mark.parametrize("uniform", [0.0, 0.5, TOP])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 1, 1.0), (1.0, 0, 1e-9), (1e-4, 0, 1.0), (100.0, 1, 0.9)]
)
def test_the_narrowest_settings_equal_greedy(uniform: float, temperature: float, top_k: int, top_p: float) -> None:
    """top_k = 1, a tiny top_p and a tiny temperature are greedy whatever the number."""
    torch.manual_seed(3)
    logits = torch.randn(6, 100)
    logits[0] = 0.0  # all equal: the tie goes to token 0
    if temperature < 1:
        logits = logits[1:]
    got = sample_reference(logits, temperature, top_k, top_p, torch.full((len(logits),), uniform))
    assert torch.equal(got, sample_reference(logits, 0, 0, 1.0, None))


@pytest.mark.parametrize("temperature", [1e-10, 1e-30, 1e-40, 1e-46, 1e-300, 5e-324])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_very_small_temperatures_are_greedy(temperature: float, dtype: torch.dtype) -> None:
    """Below 1e-45 a temperature is 0 in float32, and 0 / 0 is not a number: no NaN may choose the token."""
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf], [-2.0, -9.0, 50.0, 0.0]], dtype=dtype)
    for uniform in (0.0, 0.5, TOP):
        got = sample_reference(logits, temperature, 0, 0.9, torch.full((2,), uniform))
        assert got.tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [1e10, 1e38, 1e39, 1e300])
def test_very_large_temperatures_still_keep_the_likeliest(temperature: float) -> None:
    """Scaled to equality, the k likeliest are still the k likeliest, and all of those alike."""
    logits = torch.tensor([0.0, 1.0, 5.0, 4.0])
    assert draws(logits, temperature, 2, 1.0, grid(100)) == pytest.approx([0.0, 0.0, 0.5, 0.5])
    assert draws(logits, temperature, 1, 1.0, grid(100)) == [0.0, 0.0, 1.0, 0.0]
    logits[2] = -math.inf  # -inf / inf is not a number: forbidden is forbidden at any temperature
    assert draws(logits, temperature, 0, 1.0, grid(300)) == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])


def test_ties_go_to_the_smaller_id() -> None:
    """Where top_k or top_p cuts through equal logits, the smaller ids stay."""
    logits = torch.tensor([0.0, 2.0, 2.0, 2.0, 1.0, 2.0], dtype=torch.float64)
    assert set(sample_reference(logits.expand(500, 6), 1.0, 3, 1.0, grid(500)).tolist()) == {1, 2, 3}
    assert set(sample_reference(logits.expand(500, 6), 1.0, 4, 0.5, grid(500)).tolist()) == {1, 2}
    wide = torch.zeros(1, 4096)
    assert sample_reference(wide, 1.0, 1, 1.0, torch.tensor([TOP])).item() == 0


def test_minus_infinity_is_never_chosen() -> None:
    """Forbidden tokens stay forbidden, even for the largest number and more kept than are allowed."""
    logits = torch.full((8,), -math.inf)
    logits[3], logits[6] = 1.0, 0.0
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.999999), (7, 0.99)):
        numbers = torch.cat((grid(200), torch.tensor([0.0, TOP], dtype=torch.float64)))
        assert set(sample_reference(logits.expand(202, 8), 1.0, top_k, top_p, numbers).tolist()) == {3, 6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.6, 2, 0.9), (1.0, 1, 1.0)]
)
def test_a_row_with_a_nan_gives_minus_one(dtype: torch.dtype, temperature: float, top_k: int, top_p: float) -> None:
    """Broken weights are told by an impossible id, and only in the rows that they broke; of either sign, anywhere."""
    logits = torch.tensor([[1.0, 9.0, 0.0], [1.0, 9.0, 0.0], [0.0, -1.0, 9.0], [0.0] * 3, [-math.inf] * 3], dtype=dtype)
    logits[0, 2], logits[1, 0], logits[3], logits[4, 1] = math.nan, -torch.tensor(math.nan), math.nan, math.nan
    uniform = torch.full((5,), 0.4) if temperature else None
    assert sample_reference(logits, temperature, top_k, top_p, uniform).tolist() == [-1, -1, 2, -1, -1]


@pytest.mark.parametrize("uniform", [0.0, 0.5, TOP])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1e300])
def test_infinite_rows_give_the_first_of_their_largest(temperature: float, uniform: float) -> None:
    """+inf is certain, however many tokens have it; where everything is forbidden, token 0; neither is a NaN."""
    logits = torch.tensor([[0.0, math.inf, 5.0, math.inf], [-math.inf] * 4])
    for top_k, top_p in ((0, 1.0), (3, 0.9)):
        assert sample_reference(logits, temperature, top_k, top_p, torch.full((2,), uniform)).tolist() == [1, 0]


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4, 2.0**30])
def test_a_constant_on_all_logits_changes_nothing(shift: float) -> None:
    """exp(10000) is infinite: the maximum must be taken out first."""
    logits = torch.tensor([0.0, 1024.0, 1025.0, 1023.0], dtype=torch.float64)
    expected = draws(logits, 1.0, 0, 1.0, grid(500))
    assert draws(logits + shift, 1.0, 0, 1.0, grid(500)) == expected
    assert expected[2] == pytest.approx(1 / (1 + math.exp(-1) + math.exp(-2)), abs=0.003)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_extreme_magnitudes_in_float32(scale: float) -> None:
    """Tiny logits are uniform, huge ones greedy; neither overflows."""
    logits = torch.tensor([1.0, 3.0, 2.0, 0.0]) * scale
    expected = [0.25] * 4 if scale < 1 else [0.0, 1.0, 0.0, 0.0]
    assert draws(logits, 1.0, 0, 1.0, grid(400)) == pytest.approx(expected, abs=0.003)


def test_a_row_is_what_it_is_alone() -> None:
    """Rows may not share a cut or a sum; views and empty batches work; nothing is overwritten."""
    torch.manual_seed(4)
    storage = torch.randn(50, 5)
    logits = storage.t()
    before = storage.clone()
    uniform = torch.rand(5)
    got = sample_reference(logits, 0.8, 10, 0.9, uniform)
    alone = [sample_reference(logits[[row]], 0.8, 10, 0.9, uniform[[row]]).item() for row in range(5)]
    assert got.tolist() == alone
    order = torch.tensor([3, 1, 4, 0, 2])
    assert torch.equal(sample_reference(logits[order], 0.8, 10, 0.9, uniform[order]), got[order])
    assert torch.equal(storage, before)
    assert sample_reference(logits[:0], 0.8, 10, 0.9, uniform[:0]).shape == (0,)
    assert sample_reference(logits[:0], 0, 0, 1.0, None).shape == (0,)
    assert sample_reference(torch.zeros(2, 1), 0.8, 10, 0.9, torch.tensor([0.0, TOP])).tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_widened_first(dtype: torch.dtype) -> None:
    """A cumulative sum in bfloat16 would stop growing after 256 tokens."""
    logits = torch.zeros(1, 1000, dtype=dtype)
    got = [sample_reference(logits, 1.0, 0, 1.0, torch.tensor([u])).item() for u in (0.0005, 0.5005, 0.9995)]
    assert got == [0, 500, 999]
    torch.manual_seed(5)
    logits, uniform = torch.randn(50, 300).to(dtype), torch.rand(50)
    wide = sample_reference(logits.float(), 0.7, 20, 0.9, uniform)
    assert torch.equal(sample_reference(logits, 0.7, 20, 0.9, uniform), wide)
