"""The engine's requests: the tokens of `generate`, ends of every kind, faults; pages are counted after each.

On the PyTorch path, whose tokens are the same and whose bits are not promised; test_bits.py has the Triton path.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tritium.runtime.decoder import Decoder
from tritium.runtime.engine.engine import Engine
from tritium.runtime.engine.request import Request
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate

from tests.runtime.test_triton_path import prompt, small
from tests.tiny import tokenizer

from .conftest import PAGE

GREEDY = SamplingOptions(6, temperature=0)
SAMPLED = SamplingOptions(9, temperature=0.9, top_k=30, top_p=0.9, seed=3)
PROMPTS = [prompt(length, length) for length in (3, PAGE - 2, 2 * PAGE, 2 * PAGE + 1, 1, PAGE + 7)]


@pytest.fixture(scope="module")
def model() -> Decoder:
    return small(vocab_size=332).use_backend("torch").to("cpu")


def alone(model: Decoder, tokens: Sequence[int], options: SamplingOptions) -> list[int]:
    return list(_alone(model, tuple(tokens), options))


@functools.cache
def _alone(model: Decoder, tokens: tuple[int, ...], options: SamplingOptions) -> list[int]:
    return [token for (token,) in generate(model, [tokens], options) if token is not None]


def all_alone(model: Decoder, prompts: Sequence[Sequence[int]], options: SamplingOptions) -> list[list[int]]:
    seeds = [None if options.seed is None else options.seed + place for place in range(len(prompts))]
    each = [dataclasses.replace(options, seed=seed) for seed in seeds]
    return [alone(model, tokens, how) for tokens, how in zip(prompts, each, strict=True)]


@pytest.mark.parametrize("options", [GREEDY, SAMPLED])
@pytest.mark.parametrize(("rows", "tokens", "at_once"), [(16, 40 * PAGE, 8192), (3, 5 * PAGE, 10), (1, 3 * PAGE, 7)])
def test_the_tokens_of_generate(model: Decoder, options: SamplingOptions, rows: int, tokens: int, at_once: int) -> None:
    """With room for all, with little, with one at a time; twice, the second time from the cache."""
    engine = Engine(model, tokens=tokens, rows=rows, at_once=at_once)
    expected = all_alone(model, PROMPTS, options)
    assert engine.generate(PROMPTS, options) == expected
    assert engine.generate(PROMPTS[::-1], dataclasses.replace(options, seed=None if options is GREEDY else 3)) == (
        all_alone(model, PROMPTS[::-1], options)
    )
    total = tokens // PAGE
    assert engine.pages() == (total, 0, total)


@pytest.mark.parametrize("family", ["qwen1", "gpt", "qwen3_moe", "mobilellm"])
def test_families(family: str) -> None:
    """Qwen1's angles go by the length of each row's prompt, and so do its pages: those of another stretch differ."""
    model = small(family).use_backend("torch").to("cpu")
    batch = [*PROMPTS, PROMPTS[3][: PAGE + 1], PROMPTS[3]]
    engine = Engine(model, tokens=20 * PAGE, rows=4, at_once=40)
    assert engine.generate(batch, GREEDY) == all_alone(model, batch, GREEDY)
    again = [engine.submit(tokens, GREEDY) for tokens in (PROMPTS[3], PROMPTS[3][: PAGE + 1])]
    list(engine.run())
    assert [request.reused for request in again] == [2 * PAGE, PAGE]
    cold = Engine(model, tokens=20 * PAGE)
    cold.generate([PROMPTS[3]], GREEDY)
    shorter = cold.submit(PROMPTS[3][: PAGE + 1], GREEDY)
    list(cold.run())
    assert shorter.reused == (0 if family == "qwen1" else PAGE)
    assert shorter.tokens == alone(model, shorter.prompt, GREEDY)


def test_a_stop_token_ends_a_request(model: Decoder) -> None:
    free = alone(model, PROMPTS[0], GREEDY)
    engine = Engine(model, tokens=10 * PAGE)
    stopped, other = engine.submit(PROMPTS[0], GREEDY, eos_ids=[free[2]]), engine.submit(PROMPTS[1], GREEDY)
    for _ in engine.run():
        pass
    assert stopped.tokens == free[: free.index(free[2]) + 1]
    assert (stopped.reason, other.reason) == ("stop", "length")
    assert other.tokens == alone(model, PROMPTS[1], GREEDY)
    none = engine.submit(PROMPTS[0], SamplingOptions(0))
    assert (none.reason, none.tokens, list(engine.run())) == ("length", [], [])


def test_text(model: Decoder) -> None:
    """A tokenizer encodes prompts, names the EOS, and leaves out what is behind its last token."""
    words = tokenizer()
    engine = Engine(model, words, tokens=10 * PAGE)
    request = engine.submit("The quick fox", GREEDY)
    assert request.prompt == words.encode("The quick fox")
    assert request.eos_ids == tuple(words.eos_ids)
    for _ in engine.run():
        pass
    (expected,) = zip(*generate(model, [request.prompt], GREEDY, words.eos_ids, words.id_limit), strict=True)
    assert tuple(request.tokens) == expected
    limited = Engine(model, tokens=10 * PAGE)
    limited._vocabulary = limited._rounds._vocabulary = 40
    assert max(limited.generate([PROMPTS[0]], SamplingOptions(30, seed=0, top_p=1.0))[0]) < 40
    with pytest.raises(TritiumError, match="the engine has no tokenizer"):
        limited.submit("text", GREEDY)


def test_every_token_is_handed_out_once(model: Decoder) -> None:
    """In order, to the callback first; requests come in the midst of it, from the loop and from a callback."""
    engine = Engine(model, tokens=20 * PAGE, at_once=20)
    heard: list[tuple[int, int]] = []
    late: list[Request] = []

    def hear(request: Request, token: int) -> None:
        heard.append((id(request), token))
        if len(heard) == 2:
            late.append(engine.submit(PROMPTS[3], GREEDY, callback=hear))

    early = [engine.submit(tokens, GREEDY, callback=hear) for tokens in PROMPTS[:2]]
    seen: list[tuple[int, int]] = []
    for request, token in engine.run():
        seen.append((id(request), token))
        assert request.tokens[-1] == token
        assert heard == seen
        if len(seen) == 4:
            late.append(engine.submit(PROMPTS[4], GREEDY))
            late[-1].callback = hear
    for request in early + late:
        assert [token for owner, token in seen if owner == id(request)] == request.tokens
        assert request.tokens == alone(model, request.prompt, GREEDY)
    assert len(late) == 2


def test_first_come_first_served(model: Decoder) -> None:
    """One row: each request is through before the next begins. A long prompt does not stop those that decode."""
    engine = Engine(model, tokens=20 * PAGE, rows=1)
    requests = [engine.submit(tokens, GREEDY) for tokens in PROMPTS[:3]]
    assert [requests.index(request) for request, _ in engine.run()] == [0] * 6 + [1] * 6 + [2] * 6
    engine = Engine(model, tokens=20 * PAGE, rows=2, at_once=8)
    short, long = engine.submit(PROMPTS[0], GREEDY), engine.submit(PROMPTS[2], GREEDY)
    order = [request for request, _ in engine.run()]
    assert order[:6] == [short] * 6  # while eight pieces of the long one are read
    assert order[6:] == [long] * 6


@pytest.mark.parametrize("when", range(0, 30, 3))
def test_cancelled_at_any_time(model: Decoder, when: int) -> None:
    """Waiting, in its prompt, decoding, put off, ended: its pages are free, the others' tokens the same."""
    engine = Engine(model, tokens=4 * PAGE, rows=3, at_once=11)
    requests = [engine.submit(tokens, GREEDY) for tokens in PROMPTS]
    chosen = requests[when % len(requests)]
    for count, _ in enumerate(engine.run()):
        if count == when:
            held, before = engine.pages().held, list(chosen.tokens)
            ended = chosen.reason
            chosen.cancel()
            assert engine.pages().held <= held
            assert chosen.reason == (ended or "cancelled")
    assert engine.pages() == (4, 0, 4)
    assert chosen.tokens == before
    for request in requests:
        expected = alone(model, request.prompt, GREEDY)
        assert request.tokens == (expected[: len(before)] if request is chosen else expected)
    chosen.cancel()  # of no effect
    assert engine.generate([PROMPTS[0]], GREEDY) == [alone(model, PROMPTS[0], GREEDY)]


@pytest.mark.parametrize("when", [1, 3, 6])
def test_an_exception_in_a_callback(model: Decoder, when: int) -> None:
    """Ends its request, is said and kept; a KeyboardInterrupt leaves the loop, and the next one goes on."""
    engine = Engine(model, tokens=8 * PAGE, rows=3, at_once=30)

    def fail(request: Request, token: int) -> None:
        if len(request.tokens) == when:
            raise OSError("the reader left")

    requests = [engine.submit(PROMPTS[0], GREEDY), engine.submit(PROMPTS[3], GREEDY, callback=fail)]
    requests.append(engine.submit(PROMPTS[1], GREEDY))
    with pytest.warns(RuntimeWarning, match="a request ended, the others go on: OSError: the reader left"):
        seen = [request for request, _ in engine.run()]
    assert engine.pages() == (8, 0, 8)
    failed = requests.pop(1)
    assert failed.reason == "error"
    assert isinstance(failed.error, OSError)
    assert seen.count(failed) == when - 1
    assert [request.tokens for request in requests] == [alone(model, request.prompt, GREEDY) for request in requests]


def interrupted(*args: object) -> None:
    raise KeyboardInterrupt


def interrupted_behind(work: Callable[..., object]) -> Callable[..., object]:
    def worked(*args: Any, **how: Any) -> None:
        work(*args, **how)
        raise KeyboardInterrupt

    return worked


@pytest.mark.parametrize("where", ["callback", "forward", "round", "loop", "admit"])
def test_left_half_way(model: Decoder, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop's end or an interrupt, wherever it comes: the next loop goes on, with the same tokens, none twice."""
    engine = Engine(model, tokens=5 * PAGE, rows=3, at_once=40)
    requests = [engine.submit(tokens, GREEDY) for tokens in PROMPTS]
    handed: list[tuple[Request, int]] = []

    def once() -> None:
        with monkeypatch.context() as patch:
            if where == "callback":
                for request in requests:
                    request.callback = interrupted
            elif where == "forward":
                patch.setattr(Decoder, "run", interrupted_behind(Decoder.run))
            elif where == "round":
                patch.setattr(engine._rounds, "run", interrupted_behind(engine._rounds.run))
            elif where == "admit":
                patch.setattr(engine._cache, "give_pages", interrupted_behind(engine._cache.give_pages))
            if where == "loop":
                for number, pair in enumerate(engine.run()):
                    handed.append(pair)
                    if number == 4:
                        return
            with pytest.raises(KeyboardInterrupt):
                handed.extend(engine.run())
        for request in requests:
            request.callback = None

    for _ in range(2):
        once()
        loop = engine.run()
        handed += [next(loop) for _ in range(5)]
        loop.close()
    list(engine.run())
    assert engine.pages() == (5, 0, 5)
    lost = 2 if where == "callback" else 0  # a token whose callback was interrupted is in the request, and not given
    assert len(handed) + lost <= sum(len(request.tokens) for request in requests)
    assert [request.tokens for request in requests] == [alone(model, request.prompt, GREEDY) for request in requests]


def test_cancelled_between_loops(model: Decoder) -> None:
    engine = Engine(model, tokens=5 * PAGE, rows=3)
    requests = [engine.submit(tokens, GREEDY) for tokens in PROMPTS]
    loop = engine.run()
    next(loop)
    with pytest.raises(TritiumError, match="the engine runs already"):
        next(engine.run())
    loop.close()
    assert engine.pages().held > 0
    for request in requests:
        request.cancel()
    assert engine.pages() == (5, 0, 5)
    assert list(engine.run()) == []
    assert {request.reason for request in requests} == {"cancelled"}


def test_what_is_refused(model: Decoder) -> None:
    """At once, in one line, and nothing of it stays."""
    engine = Engine(model, tokens=3 * PAGE)
    fits = engine.submit(prompt(2 * PAGE), SamplingOptions(PAGE + 1, temperature=0))
    refused = {
        f"takes 4 pages of {PAGE}; the engine has 3: make it with tokens={4 * PAGE}": (
            prompt(2 * PAGE),
            SamplingOptions(PAGE + 2),
        ),
        "the prompt is empty": ([], GREEDY),
        "token id 332 lies outside": ([332], GREEDY),
        "would exceed the context length of 600": (prompt(5), SamplingOptions(596)),
    }
    for match, (tokens, options) in refused.items():
        with pytest.raises(TritiumError, match=match):
            engine.submit(tokens, options)
    with pytest.raises(TritiumError, match="token id 332"):
        engine.generate([PROMPTS[0], [332]], GREEDY)
    assert {request for request, _ in engine.run()} == {fits}
    assert len(fits.tokens) == PAGE + 1
    for name, value in (("rows", 0), ("at_once", True), ("tokens", -1)):
        with pytest.raises(TritiumError, match=f"{name}: must be a whole number of 1 or more"):
            Engine(model, **{"tokens": PAGE, name: value})


def test_what_is_not_a_number(model: Decoder) -> None:
    """Only the request that meets it ends; `generate` says it."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.embedding.weight[7] = float("nan")
    clean = [token for token in PROMPTS[1] if token != 7]
    expected = alone(model, clean, SamplingOptions(2, temperature=0))
    assert 7 not in expected
    engine = Engine(broken, tokens=5 * PAGE)
    requests = [engine.submit(tokens, SamplingOptions(2, temperature=0)) for tokens in (clean, [1, 7], clean)]
    with pytest.warns(RuntimeWarning, match="the logits are not numbers"):
        list(engine.run())
    assert [request.reason for request in requests] == ["length", "error", "length"]
    assert [request.tokens for request in requests] == [expected, [], expected]
    with pytest.warns(RuntimeWarning), pytest.raises(TritiumError, match="the logits are not numbers"):
        engine.generate([[7]], GREEDY)
    assert engine.pages() == (5, 0, 5)


def test_the_model_stays_where_it_is(model: Decoder) -> None:
    moved = copy.deepcopy(model)
    engine = Engine(moved, tokens=5 * PAGE)
    engine.submit(PROMPTS[0], GREEDY)
    moved.to(torch.float64)
    with pytest.raises(TritiumError, match="moved, or cast, since its engine was made"):
        list(engine.run())


def test_what_is_forgotten_is_computed(model: Decoder) -> None:
    changed = copy.deepcopy(model)
    engine = Engine(changed, tokens=5 * PAGE)
    engine.generate([PROMPTS[3]], GREEDY)
    with torch.no_grad():
        changed.embedding.weight.mul_(1.5)
    engine.forget()
    assert engine.generate([PROMPTS[3]], GREEDY) == [alone(changed, PROMPTS[3], GREEDY)]
    cold = Engine(model, tokens=5 * PAGE, reuse_prefixes=False)
    requests = [cold.submit(PROMPTS[3], GREEDY) for _ in range(2)]
    list(cold.run())
    assert [request.reused for request in requests] == [0, 0]


def test_the_size_of_the_cache(model: Decoder) -> None:
    """As much as is asked for, in whole pages, but no more than the rows can fill."""
    assert Engine(model, tokens=PAGE + 1).pages().total == 2
    assert Engine(model, rows=2).pages().total == 2 * -(-600 // PAGE)
