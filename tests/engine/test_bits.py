"""On the Triton path every sequence has the bits of one-by-one `generate`: tokens, and every layer's keys and values.

Without a GPU the kernels run in the interpreter: pages of 32 tokens, two narrow layers.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime.decoder import Decoder
from tritium.runtime.engine.engine import Engine
from tritium.runtime.engine.request import Job, Request
from tritium.runtime.engine.scheduler import Scheduler
from tritium.runtime.generation import SamplingOptions, generate

from tests.rule import DEVICE, same_bits
from tests.runtime.test_triton_path import prompt, small

PAGE = 256 if DEVICE == "cuda" else 32  # whole key tiles, which are wider on a GPU
SHORT, MIDDLE, EDGE, LONG = prompt(5), prompt(11, 3), prompt(PAGE - 2, 1), prompt(2 * PAGE + 1, 2)
STEPS = {tuple(SHORT): 18, tuple(MIDDLE): 17, tuple(EDGE): 7}  # the most that a test asks for; 4 of all others


def greedy(count: int) -> SamplingOptions:
    return SamplingOptions(count, temperature=0)


def alone(model: Decoder, tokens: Sequence[int], options: SamplingOptions) -> tuple[list[int], Tensor]:
    """(tokens, keys and values [slots, 2, heads, held, D]) of `generate`."""
    found = [token for (token,) in generate(model, [tokens], options) if token is not None]
    assert model.sessions._kept is not None
    cache = model.sessions._kept.cache
    values = cache.copy_out(cache._host_table[0]).flatten(3, 4)
    return found, values[:, :, :, : len(tokens) + len(found) - 1].clone()


@pytest.fixture(scope="module")
def model() -> Decoder:
    return small(num_heads=2, num_kv_heads=1)


@pytest.fixture(scope="module")
def expected(model: Decoder) -> Callable[[Sequence[int], int], tuple[list[int], Tensor]]:
    """What a prompt gives alone, as far as is asked for: each is generated once."""
    made: dict[tuple[int, ...], tuple[list[int], Tensor]] = {}

    def look_up(tokens: Sequence[int], count: int) -> tuple[list[int], Tensor]:
        key = tuple(tokens)
        if key not in made:
            made[key] = alone(model, tokens, greedy(STEPS.get(key, 4)))
        found, values = made[key]
        return found[:count], values[:, :, :, : len(tokens) + count - 1]

    return look_up


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[Request, Tensor]:
    """The keys and values of every request as they are when it gives back its pages."""
    found: dict[Request, Tensor] = {}
    remove = Scheduler.remove

    def looked_at(self: Scheduler, job: Job) -> None:
        if job.row is not None:
            values: Any = self._store.copy_out(job.pages)
            found[job.request] = values.flatten(3, 4)[:, :, :, : job.held]
        remove(self, job)

    monkeypatch.setattr(Scheduler, "remove", looked_at)
    return found


def check(requests: list[Request], held: dict[Request, Tensor], expected: Callable[..., Any]) -> None:
    for request in requests:
        tokens, values = expected(request.prompt, request.options.max_new_tokens)
        assert request.tokens == tokens
        assert request.reason == "length"
        assert same_bits(held[request], values)


def finish(engine: Engine) -> None:
    for _ in engine.run():
        pass
    assert engine.pages().held == 0


def test_any_number_of_others(model: Decoder, held: dict[Request, Tensor], expected: Callable[..., Any]) -> None:
    """17 rows down to 1, one leaving after every step, in an order that is not that of their coming."""
    engine = Engine(model, tokens=24 * PAGE, rows=17)
    engine._rounds.ahead = 1
    sizes: list[int] = []
    run = engine._rounds.run

    def counted(jobs: Sequence[Job], count: int) -> list[list[int]]:
        sizes.append(len(jobs))
        return run(jobs, count)

    engine._rounds.run = counted  # type: ignore[method-assign]
    limits = [2 + (7 * place) % 17 for place in range(17)]
    requests = [engine.submit([SHORT, MIDDLE][place % 2], greedy(limit)) for place, limit in enumerate(limits)]
    finish(engine)
    assert sizes == list(range(17, 0, -1))
    check(requests, held, expected)


def test_prompts_in_pieces_join_those_that_decode(
    model: Decoder, held: dict[Request, Tensor], expected: Callable[..., Any]
) -> None:
    """Pieces that end within a page and at its border, the last of one token; others decode between them."""
    engine = Engine(model, tokens=40 * PAGE, rows=4, at_once=PAGE, reuse_prefixes=False)
    engine._rounds.ahead = 3
    requests = [engine.submit(SHORT, greedy(6)), engine.submit(LONG, greedy(3))]
    for _ in engine.run():
        if len(requests) == 2:
            requests.append(engine.submit(EDGE, greedy(4)))
    check(requests, held, expected)


def test_put_off_and_resumed(
    model: Decoder, held: dict[Request, Tensor], expected: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three pages for two sequences that come to their second one: the younger waits, and goes on where it was."""
    engine = Engine(model, tokens=3 * PAGE, rows=4)
    engine._rounds.ahead = 1
    saved: list[int] = []
    put_off = Scheduler._put_off

    def noted(self: Scheduler, job: Job) -> None:
        saved.append(len(job.tokens))
        put_off(self, job)

    monkeypatch.setattr(Scheduler, "_put_off", noted)
    requests = [engine.submit(EDGE, greedy(7)), engine.submit(EDGE, greedy(6))]
    finish(engine)
    assert saved == [3]
    check(requests, held, expected)


def test_what_is_in_the_cache_is_not_computed_again(
    model: Decoder, held: dict[Request, Tensor], expected: Callable[..., Any]
) -> None:
    """A hit of all but one token, of a whole page that is the prompt's last and so computed again, of a beginning, and
    none; while a page's holder decodes, and after everybody has gone.
    """
    engine = Engine(model, tokens=12 * PAGE, rows=4)
    other = [*LONG[:PAGE], *prompt(9, 5)]
    requests = [engine.submit(LONG, greedy(4))]
    for _ in engine.run():
        if len(requests) < 3 and requests[-1].tokens:  # a prompt of which one token is left is read by itself
            requests.append(engine.submit(*[(LONG, greedy(3)), (LONG[: 2 * PAGE], greedy(2))][len(requests) - 1]))
    requests += [engine.submit(other, greedy(2)), engine.submit([LONG[0] + 1, *LONG[1 : PAGE + 1]], greedy(1))]
    finish(engine)
    assert [request.reused for request in requests] == [0, 2 * PAGE, PAGE, PAGE, 0]
    check(requests, held, expected)


def test_rows_that_end_within_a_round(
    model: Decoder, held: dict[Request, Tensor], expected: Callable[..., Any]
) -> None:
    """By length, beyond the last page that they have, and by an EOS: they give no more, and write nobody's pages."""
    engine = Engine(model, tokens=8 * PAGE, rows=4)
    engine._rounds.ahead = 4
    stop = expected(MIDDLE, 2)[0][1]
    requests = [engine.submit(SHORT, greedy(6)), engine.submit(EDGE, greedy(3))]  # the first has the first page
    stopped = engine.submit(MIDDLE, greedy(6), eos_ids=[stop])
    finish(engine)
    check(requests, held, expected)
    assert (stopped.tokens, stopped.reason) == (expected(MIDDLE, 2)[0], "stop")


def test_angles_that_go_by_the_prompt(held: dict[Request, Tensor]) -> None:
    """Qwen1's rows of two stretches in one batch, and of one after it."""
    model = small("qwen1")
    prompts, options = [prompt(5), prompt(20, 1)], greedy(3)
    expected = [alone(model, tokens, options) for tokens in prompts]
    engine = Engine(model, tokens=8 * PAGE, rows=4)
    assert engine.generate(prompts, options) == [tokens for tokens, _ in expected]
    for request, values in held.items():
        assert same_bits(values, expected[prompts.index(list(request.prompt))][1])
    assert engine.generate(prompts[1:], options) == [expected[1][0]]


def test_as_the_trainer_and_with_fewer_ids() -> None:
    model = small(num_layers=1).use_backend("triton", sampler_equals_trainer=True)
    (expected,) = zip(*generate(model, [SHORT], greedy(3), vocabulary=40), strict=True)
    assert expected == tuple(
        token for (token,) in generate(copy.copy(model).use_backend("torch"), [SHORT], greedy(3), vocabulary=40)
    )
    engine = Engine(model, tokens=PAGE)
    engine._vocabulary = engine._rounds._vocabulary = 40
    assert engine.generate([SHORT], greedy(3)) == [list(expected)]
    assert max(expected) < 40


def test_every_row_by_its_own_options(model: Decoder) -> None:
    """Greedy and two ways of drawing in one batch, of which one has top_k."""
    options = [
        SamplingOptions(3, temperature=0),
        SamplingOptions(3, temperature=1.3, top_p=1.0, seed=4),
        SamplingOptions(2, temperature=0.8, top_k=9, seed=5),
    ]
    engine = Engine(model, tokens=4 * PAGE, rows=4)
    requests = [engine.submit(SHORT, each) for each in options]
    finish(engine)
    assert [request.tokens for request in requests] == [alone(model, SHORT, each)[0] for each in options]
    assert len({tuple(request.tokens[:2]) for request in requests}) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "mobilellm", "qwen1", "qwen3_moe", "gpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_families(family: str, dtype: torch.dtype, held: dict[Request, Tensor]) -> None:
    """24 prompts of many lengths through a cache that cannot hold half of them, captured steps included."""
    model = small(family, dtype=dtype)
    prompts = [prompt(1 + 37 * place % (PAGE + 50), place % 5) for place in range(24)]
    options = SamplingOptions(40, temperature=0.8, seed=1)
    expected = []
    for place, tokens in enumerate(prompts):
        expected.append(alone(copy.copy(model), tokens, SamplingOptions(40, temperature=0.8, seed=1 + place)))
    engine = Engine(model, tokens=10 * PAGE, rows=17, at_once=100)
    assert engine.generate(prompts, options) == [tokens for tokens, _ in expected]
    values = sorted(held.items(), key=lambda item: prompts.index(list(item[0].prompt)))
    assert len(values) == len(prompts)
    for request, found in values:
        assert any(same_bits(found, mine) for _, mine in expected if mine.shape == found.shape), request
