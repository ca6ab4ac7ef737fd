"""Decoding on the device: the host loop's tokens, whatever the form of the step; stops, sessions, captures.

Without a GPU the steps run in Triton's interpreter, one by one; with one they are captured and replayed.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tritium.runtime import generation
from tritium.runtime.decoder import Decoder
from tritium.runtime.decoding import Decoding, bucket
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.kv_cache import PAGE_SIZE, KVCache

from tests.rule import DEVICE, same_bits

from .test_triton_path import Forbids, prompt, small

PROMPTS = [prompt(5), prompt(1, 1)]
GREEDY = SamplingOptions(4, temperature=0)
SAMPLED = SamplingOptions(4, temperature=0.9, top_k=30, top_p=0.9, seed=3)


def rows(model: Decoder, prompts: list[list[int]], options: SamplingOptions, **how: Any) -> list[list[int | None]]:
    return [list(row) for row in zip(*generate(model, prompts, options, **how), strict=True)]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps composed of single operations, instead of fused."""
    chosen = Decoder.kernels.fget  # type: ignore[attr-defined]
    monkeypatch.setattr(Decoder, "kernels", property(lambda self: dataclasses.replace(chosen(self), decode=None)))


@pytest.mark.parametrize("family", ["qwen3", "mobilellm", "qwen1", "qwen3_moe", "gpt"])
def test_the_same_tokens_as_on_the_host(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused and plain steps on the device, and the PyTorch path's loop: a ragged batch, greedy and sampled."""
    model = small(family)
    for options in (GREEDY, SAMPLED) if family == "qwen3" else (SAMPLED,):
        expected = rows(copy.copy(model).use_backend("torch"), PROMPTS, options)
        assert rows(model, PROMPTS, options) == expected
        if family in ("qwen3", "gpt"):
            with monkeypatch.context() as patch:
                plain(patch)
                assert rows(model, PROMPTS, options) == expected
    assert len({token for row in expected for token in row}) > 4  # an output that moves


def test_heads_that_the_fused_kernel_has_no_room_for() -> None:
    """They go through the kernels of which a step is otherwise composed; its other phases stay fused."""
    model = small(num_layers=1, num_heads=64, num_kv_heads=1, head_dim=128)
    options = SamplingOptions(3, temperature=0)
    expected = rows(copy.copy(model).use_backend("torch"), PROMPTS[:1], options)
    assert rows(model, PROMPTS[:1], options) == expected


def test_as_the_trainer_steps_are_prefills() -> None:
    model = small().use_backend("triton", sampler_equals_trainer=True)
    expected = rows(copy.copy(model).use_backend("torch"), PROMPTS, GREEDY)
    assert rows(model, PROMPTS, GREEDY) == expected


def test_rows_end_by_themselves() -> None:
    """A row gives None behind its stop token while others go on, and the loop ends with the last; a limit holds."""
    model = small(num_layers=1)
    free = rows(model, PROMPTS, GREEDY)
    stop = free[0][1]
    assert stop is not None
    assert stop not in (free[0][0], *free[1])
    stopped = rows(model, PROMPTS, GREEDY, eos_ids=[stop])
    assert stopped == [[*free[0][:2], None, None], free[1]]
    assert rows(model, PROMPTS[:1], GREEDY, eos_ids=[stop]) == [free[0][:2]]
    limited = rows(model, PROMPTS, GREEDY, vocabulary=40)
    assert limited == rows(copy.copy(model).use_backend("torch"), PROMPTS, GREEDY, vocabulary=40)
    assert all(token is not None and token < 40 for row in limited for token in row)
    assert not all(token is not None and token < 40 for row in free for token in row)


def test_what_is_not_a_number_is_said() -> None:
    model = small(num_layers=1)
    with torch.no_grad():
        model.stack.layers[0].mlp.down.weight.fill_(float("nan"))
    with pytest.raises(TritiumError, match="the logits are not numbers"):
        list(generate(model, PROMPTS[:1], GREEDY))


def test_a_session_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest first, then smaller ones in its place; another only for what does not fit. Tokens are those of a
    model that never ran; two loops at a time do not share one."""
    model = small(num_layers=1)
    made: list[Decoding] = []
    begin = Decoding.__init__

    def counted(self: Decoding, *args: Any) -> None:
        made.append(self)
        begin(self, *args)

    monkeypatch.setattr(Decoding, "__init__", counted)

    def fresh(prompts: list[list[int]], options: SamplingOptions) -> list[list[int | None]]:
        found = rows(copy.deepcopy(model), prompts, options)
        made.pop()
        return found

    batches = [[prompt(9), prompt(3)], [prompt(2, 5)] * 2, [prompt(7, 6), prompt(1, 7)]]
    for batch in batches:
        assert rows(model, batch, GREEDY) == fresh(batch, GREEDY)
    assert len(made) == 1
    assert rows(model, batches[0][:1], GREEDY) == fresh(batches[0][:1], GREEDY)  # another bucket
    assert len(made) == 2
    first, second = (generate(model, [batch[0]], GREEDY) for batch in batches[:2])
    together = [[next(first)[0], next(second)[0]] for _ in range(GREEDY.max_new_tokens)]
    assert [list(row) for row in zip(*together, strict=True)] == [fresh([batch[0]], GREEDY)[0] for batch in batches[:2]]
    assert len(made) == 3
    assert next(first, None) is next(second, None) is None  # at its end, and not before, each gives its own back
    for _ in generate(model, [prompt(3)], GREEDY):  # a loop that is left early gives its session back
        break
    assert rows(model, [prompt(4)], GREEDY) == fresh([prompt(4)], GREEDY)
    assert len(made) == 3
    with torch.no_grad():  # in place: nothing has to be made anew, and nothing is stale, be it made of parameters
        model.embedding.weight.mul_(1.1)
        model.stack.layers[0].attention.q_norm.weight.mul_(-1.5)
    assert rows(model, [prompt(4)], GREEDY) == fresh([prompt(4)], GREEDY)
    assert len(made) == 3
    model.embedding.weight = torch.nn.Parameter(model.embedding.weight * 0.9)
    assert rows(model, [prompt(4)], GREEDY) == fresh([prompt(4)], GREEDY)
    assert len(made) == 4
    loop = generate(model, [prompt(3)], GREEDY)
    next(loop)
    model.to(DEVICE)
    assert model.sessions._kept is None  # moved models leave no cache behind
    with pytest.raises(TritiumError, match="was moved, or cast, while it generated"):
        next(loop)
    assert model.sessions._kept is None


def test_buckets() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 5, 8, 9, 16, 17, 32, 33)] == [1, 2, 4, 8, 8, 16, 16, 32, 32, 48]


def test_pages_are_crossed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that come to a new page at different steps, in a table whose pages lie in no order."""
    model = small(num_layers=1)
    batch = [prompt(PAGE_SIZE - 2), prompt(PAGE_SIZE - 4, 1)]
    options = SamplingOptions(5, temperature=0)
    expected = rows(copy.copy(model).use_backend("torch"), batch, options)
    zeroed = KVCache.__init__

    def shuffled(self: KVCache, *args: Any, **kwargs: Any) -> None:
        zeroed(self, *args, **kwargs)
        count = self.page_table.numel()
        self.assign_pages(torch.arange(count - 1, -1, -1).view(self.page_table.shape))

    monkeypatch.setattr(KVCache, "__init__", shuffled)
    assert rows(model, batch, options) == expected


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_prompt_in_pieces_has_the_bits_of_the_whole(family: str) -> None:
    """Pieces of 2 to 6 tokens, rows that end earlier than others, the last piece a single token."""
    model = small(family, dtype=torch.bfloat16)
    batch = [prompt(13), prompt(1, 1), prompt(6, 2)]
    with torch.inference_mode():
        found = []
        for at_once in (1000, 6):
            cache = KVCache(model.config, 3, 20, model.dtype, DEVICE)
            logits = generation.prefill(model, model.bind(), batch, cache, at_once)
            found.append((logits, *(cache.keys[1][head, 0, :13] for head in range(2))))
            assert cache.lengths == [13, 1, 6]
    assert all(same_bits(mine, whole) for mine, whole in zip(found[1], found[0], strict=True))


def storages(values: Any) -> set[int]:
    found = [value for value in tree_leaves(values) if isinstance(value, Tensor) and value.numel()]
    return {value.untyped_storage().data_ptr() for value in found}


class ForbidsAllocation(Forbids):
    """As Forbids, and whatever gives a result that does not lie where an argument does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if storages(result) - storages((args, kwargs)):
            raise AssertionError(f"a decode step calls {func}, which allocates")
        return result


def decoding(model: Decoder, options: SamplingOptions, count: int = 2) -> Decoding:
    """`count` rows with a token each behind their prompts, and the first step done."""
    found = Decoding(model, model.bind(), count, 40, options, [96], 90)
    batch = [prompt(4, row) for row in range(count)]
    logits = generation.prefill(model, found.plan, batch, found.cache)
    found.begin([4] * count, torch.full((count, 20), 0.4, device=DEVICE))
    found.take(logits.argmax(-1))
    found.step()
    return found


@pytest.mark.parametrize("family", ["qwen3", "mobilellm", "qwen3_moe"])
@pytest.mark.usefixtures("unguarded_interpreter")
def test_what_is_captured_asks_nothing_of_the_host(family: str) -> None:
    """No look at a value, no copy from or to the host; of a dense model also no memory. On a GPU the capture itself
    would fail besides.
    """
    model = small(family, num_layers=1, **({"expert_layers": True} if family == "qwen3_moe" else {}))
    guard: type[TorchDispatchMode] = Forbids if family == "qwen3_moe" else ForbidsAllocation
    for options in (GREEDY, SAMPLED):
        with torch.inference_mode():
            found = decoding(model, options)
            before = found._history[:2].clone()
            with guard():
                found._compute()
            assert torch.equal(found._history[:2], before)
            assert found._history[2].ge(0).all()
            assert found._step.item() == 3


def test_the_guard_against_allocation_sees() -> None:
    x = torch.ones(2)
    for makes in (lambda: x + 1, lambda: torch.empty(2), lambda: x.clone(), lambda: torch.zeros_like(x)):
        with ForbidsAllocation(), pytest.raises(AssertionError, match="which allocates"):
            makes()
    with ForbidsAllocation():
        torch.index_select(x.add_(1).view(1, 2), 0, torch.zeros(0, dtype=torch.int64), out=x[:0])


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["qwen3", "mobilellm", "qwen1", "qwen3_moe", "gpt"])
def test_replays_are_steps(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured steps give what the same steps give one by one, over page borders, in sessions used again."""
    model = small(family, dtype=torch.bfloat16)
    batches = [[prompt(PAGE_SIZE - 6), prompt(30, 1)], [prompt(3, 2), prompt(300, 3)], [prompt(9, 4), prompt(2, 5)]]
    options = SamplingOptions(40, temperature=0.8, top_p=0.9, seed=1)
    captured = [rows(model, batch, options) for batch in batches]
    assert model.sessions._kept is not None
    assert model.sessions._kept._graphs
    monkeypatch.setattr(Decoding, "step", Decoding._compute)
    assert captured == [rows(copy.deepcopy(model), batch, options) for batch in batches]


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    """The stream of decode steps alone, and beside others: the history of float logits is not kept, so the cache is
    compared, which holds every layer's keys to the bit.
    """
    model = small(dtype=torch.bfloat16)
    batch = [prompt(6), prompt(3, 1)]

    def keys(prompts: list[list[int]], row: int) -> Tensor:
        list(generate(model, prompts, GREEDY))
        assert model.sessions._kept is not None
        kept = model.sessions._kept
        pages = kept.cache._host_table[row]
        return torch.stack([k[:, pages[0], : len(prompts[row]) + 3] for k in kept.cache.keys]).clone()

    for row, alone in enumerate(batch):
        assert same_bits(keys([alone], 0), keys(batch, row))
