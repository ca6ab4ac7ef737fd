"""The Triton path as a whole: the same numbers as the PyTorch path, its promises about bits, and what it never does.

Without a GPU the kernels run in Triton's interpreter, on models of a few thousand parameters.
"""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tritium.runtime.backend import Backend, differentiable_kernels, triton_kernels
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.fused import fuse
from tritium.runtime.generation import SamplingOptions, generate
from tritium.runtime.kernel_set import REFERENCE, KernelSet
from tritium.runtime.kv_cache import PAGE_SIZE, KVCache
from tritium.runtime.layers import FeedForward, MixtureOfExperts, MultiHeadAttention
from tritium.runtime.operations import DEFINITIONS, KERNELS, Operations
from tritium.runtime.registry import get_family
from tritium.runtime.triton_path import Modes, compose

import tritium
from tests import oracle
from tests.rule import DEVICE, same_bits

NEW_TOKENS = 64 if DEVICE == "cuda" else 6  # the interpreter takes seconds a token
EXACT = {"rtol": 1e-5, "atol": 1e-5}
SHAPE = {
    "vocab_size": 97, "context_length": 600, "embedding_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "head_dim": 16, "hidden_dim": 48, "norm_eps": 1e-6, "rope_base": 1e4, "rope_scaling": None,
    "tie_embeddings": False, "dtype": "float32",
}  # fmt: skip


FAMILIES: dict[str, dict[str, Any]] = {  # what each needs besides SHAPE
    "qwen3": {},
    "mobilellm": {},
    "qwen1": {
        "num_kv_heads": 4,
        "rope_scaling": {"rope_type": "qwen_ntk", "original_max_position_embeddings": 8},
        "logn_length": 8,
    },
    "qwen3_moe": {
        "expert_layers": [True, False],
        "num_experts": 6,
        "experts_per_token": 2,
        "expert_dim": 24,
        "renormalise_experts": True,
    },
    "gpt": {"num_kv_heads": 4, "activation": "gelu_tanh"},
}


def small(family: str = "qwen3", dtype: torch.dtype = torch.float32, **changes: Any) -> Decoder:
    values = {name: value for name, value in SHAPE.items() if name not in get_family(family).traits}
    spec = get_family(family).spec_from({**values, **FAMILIES[family], **changes}, "test")
    model = Decoder(spec, "triton")
    oracle.redraw(model, 2)
    return model.to(DEVICE, dtype).eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def prefill(model: Decoder, cache: KVCache, rows: list[int], prompts: list[list[int]]) -> Tensor:
    """Logits of all tokens of the prompts, which go into the cache."""
    tokens = torch.tensor([token for tokens in prompts for token in tokens], device=DEVICE)
    with torch.inference_mode():
        return model.run(model.bind(), tokens, Batch.appended(cache, rows, [len(tokens) for tokens in prompts]))[1]


def cache_of(model: Decoder, rows: int, capacity: int = 300) -> KVCache:
    return KVCache(model.config, rows, capacity, model.dtype, DEVICE)


# The two sets, and the two tables of operations, can stand in for each other.


PHASES = [entry.name for entry in dataclasses.fields(KernelSet) if entry.name not in ("name", "decode", "step")]


@pytest.mark.parametrize("field", PHASES)
def test_phases_have_one_signature(field: str) -> None:
    """Those of a decode step may give less: they leave to one of them what two of the others do."""
    plain = triton_kernels(Modes())
    assert plain.decode is not None
    ours, theirs, steps = (inspect.signature(getattr(kernels, field)) for kernels in (plain, REFERENCE, plain.decode))
    shape = [[(p.kind, p.default, p.annotation) for p in s.parameters.values()] for s in (ours, theirs, steps)]
    assert shape[0] == shape[1] == shape[2]
    assert ours.return_annotation == theirs.return_annotation


@pytest.mark.parametrize("field", [entry.name for entry in dataclasses.fields(Operations)])
def test_operations_have_one_signature(field: str) -> None:
    """Names, order and defaults: annotations may be wider in a definition, and where results go is a kernel's own."""
    kernel, definition = (inspect.signature(getattr(table, field)) for table in (KERNELS, DEFINITIONS))
    assert [(p.name, p.kind, p.default) for p in kernel.parameters.values() if p.kind != p.KEYWORD_ONLY] == [
        (p.name, p.kind, p.default) for p in definition.parameters.values()
    ]


# Numbers.

# All on a GPU; in the interpreter each kind of each family once.
KINDS = {(case.family, case.what): case for case in reversed(oracle.CASES)}
CASES = oracle.CASES if DEVICE == "cuda" else list(KINDS.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[oracle.Case], Path]:
    made: dict[oracle.Case, Path] = {}

    def get(case: oracle.Case) -> Path:
        if case not in made:
            made[case] = oracle.save(case, oracle.build(case), tmp_path_factory.mktemp("checkpoint") / str(case))
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_give_the_same_logits_and_tokens(
    case: oracle.Case, checkpoints: Callable[[oracle.Case], Path]
) -> None:
    """Logits to 1e-5 of the PyTorch path's, without a cache, and the same greedy tokens from a ragged batch."""
    model, _, _ = tritium.load(checkpoints(case), device=DEVICE, dtype="float32", backend="triton", progress=False)
    x = oracle.tokens(2, 7).to(DEVICE)
    mask = torch.ones_like(x)
    mask[1, :3] = 0
    prompts = [row[:length].tolist() for row, length in zip(oracle.tokens(2, 9), (9, 1), strict=True)]
    results = []
    for backend in ("triton", "torch"):
        model.use_backend(backend)
        with torch.inference_mode():
            results.append(
                (model(x, mask).logits, list(generate(model, prompts, SamplingOptions(NEW_TOKENS, temperature=0))))
            )
    (logits, tokens), (expected, expected_tokens) = results
    torch.testing.assert_close(logits, expected, **EXACT)
    assert tokens == expected_tokens
    assert len({token for step in tokens for token in step}) > 2


@pytest.mark.parametrize("modes", [Modes(), Modes(batch_invariant=False)], ids=["invariant", "fastest"])
@pytest.mark.parametrize("family", FAMILIES)
def test_composition_is_the_pytorch_path(family: str, modes: Modes) -> None:
    """The phases composed of definitions, with cache and without, and those of a decode step: wiring alone."""
    model = small(family)
    model.backend = Backend("torch")
    composed = compose("definitions", DEFINITIONS, modes)
    composed = dataclasses.replace(composed, decode=fuse(composed, DEFINITIONS))
    tokens = torch.tensor(prompt(9), device=DEVICE)
    results = []
    for kernels in (None, composed):
        cache = cache_of(model, 1)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            if kernels is not None:
                patch.setattr(Decoder, "kernels", kernels)
            parts = [model.run(model.bind(), tokens, Batch.fresh([9], torch.device(DEVICE)))[1]]
            for start, end in ((0, 4), (4, 8), (8, 9)):
                parts.append(model.run(model.bind(), tokens[start:end], Batch.appended(cache, [0], [end - start]))[1])
        results.append(torch.cat(parts))
    torch.testing.assert_close(results[0], results[1], **EXACT)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "norm": "layer",
            "mlp": "plain",
            "activation": "gelu_tanh",
            "mlp_bias": True,
            "qkv_bias": True,
            "out_bias": True,
        },
        {"positions": "learned", "qk_norm": "none", "tie_embeddings": True},
        {"windows": [3, None], "rope_layers": [True, False], "residual": "post_norm"},
    ],
    ids=["layer-norm", "learned", "windows"],
)
def test_other_traits(changes: dict[str, Any]) -> None:
    """What no published size of these families has, on both paths."""
    spec = get_family("qwen3").spec_from(SHAPE, "test").replace(**changes)
    model = Decoder(spec, "triton")
    oracle.redraw(model, 3)
    model = model.to(DEVICE).eval()
    x = torch.tensor([prompt(9)], device=DEVICE)
    with torch.inference_mode():
        ours, mine = model(x).logits, model.generate(x[:, :5], 4, temperature=0)
        model.use_backend("torch")
        torch.testing.assert_close(ours, model(x).logits, **EXACT)
        assert torch.equal(mine, model.generate(x[:, :5], 4, temperature=0))


def test_layers_alone_run_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer used by itself takes the set that its tensors can run on, not always the PyTorch one."""
    used = []

    def recorded(self: Backend, like: Tensor, parameters: Any = ()) -> KernelSet:
        used.append(like.shape)
        return triton_kernels(Modes())

    x = torch.randn(2, 5, 32, device=DEVICE)
    layers = (
        MultiHeadAttention(32, 4, 2, head_dim=16, max_seq_len=64),
        FeedForward(32, 48),
        MixtureOfExperts(32, 24, 5, 2),
    )
    for layer in layers:
        layer = layer.to(DEVICE)
        with torch.inference_mode():
            expected = layer(x)
            with monkeypatch.context() as patch:
                patch.setattr(Backend, "kernels", recorded)
                torch.testing.assert_close(layer(x), expected, **EXACT)
    assert len(used) == 3


# Bits.


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("qwen3", torch.float32), *((family, torch.bfloat16) for family in FAMILIES if family != "mobilellm")],
    ids=str,
)
def test_a_row_does_not_depend_on_its_batch(family: str, dtype: torch.dtype) -> None:
    """Prefill and decode of a prompt alone, and beside others at another place, packed in a cache or padded without:
    the same bits. Qwen1's prompts lie on both sides of its trained length.
    """
    model = small(family, dtype=dtype)
    prompts = [prompt(5), prompt(1, 1), prompt(19, 2)]
    together, alone = cache_of(model, 3), [cache_of(model, 1) for _ in prompts]
    batched = prefill(model, together, [2, 0, 1], prompts).split([5, 1, 19])
    following = [[7], [8], [9]]
    stepped = prefill(model, together, [2, 0, 1], following)
    for row, (tokens, cache) in enumerate(zip(prompts, alone, strict=True)):
        assert same_bits(prefill(model, cache, [0], [tokens]), batched[row])
        assert same_bits(prefill(model, cache, [0], [following[row]]), stepped[row : row + 1])
    x, mask = torch.zeros(3, 19, dtype=torch.int64), torch.zeros(3, 19, dtype=torch.int64)
    for row, (tokens, place) in enumerate(zip(prompts, (slice(14, 19), slice(0, 1), slice(0, 19)), strict=True)):
        x[row, place], mask[row, place] = torch.tensor(tokens), 1
    with torch.inference_mode():
        padded = model(x.to(DEVICE), mask.to(DEVICE)).logits
        for row, tokens in enumerate(prompts):
            single = model(torch.tensor([tokens], device=DEVICE)).logits[0]
            assert same_bits(padded[row][mask[row] == 1], single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sampler_equals_trainer(dtype: torch.dtype) -> None:
    """In this mode a token decoded has the bits of the token prefilled, with a cache or without."""
    model = small(dtype=dtype).use_backend("triton", sampler_equals_trainer=True)
    tokens = prompt(8)
    with torch.inference_mode():
        whole = model(torch.tensor([tokens], device=DEVICE)).logits[0]
    cache = cache_of(model, 1)
    parts = [prefill(model, cache, [0], [tokens[:5]])]
    parts += [prefill(model, cache, [0], [[token]]) for token in tokens[5:]]
    assert same_bits(torch.cat(parts), whole)


def test_modes_choose_their_operations() -> None:
    """Without batch invariance no dense linear kernel of ours runs; as the trainer, no decode kernel."""
    model = small("qwen3_moe")
    ran: set[str] = set()

    def counting(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            ran.add(name)
            return getattr(DEFINITIONS, name)(*args)

        return run

    counted = Operations(**{entry.name: counting(entry.name) for entry in dataclasses.fields(Operations)})
    tokens = torch.tensor(prompt(4), device=DEVICE)
    found = {}
    for modes in (Modes(), Modes(batch_invariant=False), Modes(sampler_equals_trainer=True)):
        ran.clear()
        cache = cache_of(model, 1)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "kernels", compose("counted", counted, modes))
            model.run(model.bind(), tokens[:3], Batch.appended(cache, [0], [3]))
            model.run(model.bind(), tokens[3:], Batch.appended(cache, [0], [1]))
        found[modes] = set(ran)
    attention = {"rms_norm", "qk_norm_rope_cache", "paged_attention"}
    linears = {"linear", "linear_residual", "linear_swiglu"}
    experts = {"route", "group", "grouped_swiglu", "grouped_linear", "combine"}
    assert found[Modes()] == attention | experts | linears | {"decode_attention"}
    assert found[Modes(batch_invariant=False)] == attention | experts | {"swiglu", "decode_attention"}
    assert found[Modes(sampler_equals_trainer=True)] == attention | experts | linears


# What a decode step never does.


class Forbids(TorchDispatchMode):
    """Raises where the host would look at a value or hand one over."""

    NEVER = ("_local_scalar_dense", "nonzero", "item", "lift_fresh", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.NEVER:
            raise AssertionError(f"a decode step calls {func}")
        if name in ("_to_copy", "copy_", "to"):
            target = (kwargs or {}).get("device")
            assert target is None or torch.device(target).type == DEVICE, func
        return func(*args, **(kwargs or {}))


def test_the_guard_sees() -> None:
    for forbidden in (
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1, 2]) + x,
        lambda x: bool(x.any()),
    ):
        with Forbids(), pytest.raises(AssertionError, match="a decode step calls"):
            forbidden(torch.ones(2))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.usefixtures("unguarded_interpreter")
def test_a_decode_step_never_looks_at_the_host(temperature: float) -> None:
    """Step, forward and sampling, across a page border, under the guard; on a GPU also with synchronising forbidden."""
    model = small("qwen3_moe", num_layers=1, expert_layers=True)
    cache = cache_of(model, 2, PAGE_SIZE + 5)
    first = torch.tensor([3, 4], device=DEVICE)
    prefill(model, cache, [0, 1], [prompt(PAGE_SIZE - 2), prompt(3)])
    uniforms = torch.full((2, 6), 0.4, device=DEVICE)
    with torch.inference_mode():
        plan, kernels = model.bind(), model.kernels
    with torch.inference_mode():
        batch = Batch.appended(cache, [0, 1], [1, 1])
        _, logits = model.run(plan, first, batch, last_only=True)
        tokens = kernels.sample(logits, temperature, 5, 0.9, uniforms[:, 0])
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with Forbids():
                for step in range(1, 4):
                    _, logits = model.run(plan, tokens, batch.step(), last_only=True)
                    tokens = kernels.sample(logits, temperature, 5, 0.9, uniforms[:, step])
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert cache.lengths == [PAGE_SIZE + 2, 7]
    assert logits.isfinite().all()


def test_a_step_in_place_is_the_batch_made_anew() -> None:
    """Positions, slots and lengths after steps, with shuffled pages and a border crossed."""
    model = small(num_layers=1)
    cache = cache_of(model, 2, 2 * PAGE_SIZE)
    cache.assign_pages(torch.tensor([[3, 0], [1, 2]]))
    cache.lengths = [PAGE_SIZE - 2, 5]
    batch = Batch.appended(cache, [1, 0], [1, 1])
    assert batch.device_lengths.tolist() == [6, PAGE_SIZE - 1]
    kept = (batch.positions, batch.slots, batch.device_lengths, batch.page_table)
    for _ in range(3):
        cache.advance([1, 0], [1, 1])
        batch.step()
        # A captured step reads and writes where it did: nothing may move.
        now = (batch.positions, batch.slots, batch.device_lengths, batch.page_table)
        assert all(before is after for before, after in zip(kept, now, strict=True))
        fresh = Batch.appended(cache, [1, 0], [1, 1])
        assert batch.slots is not None
        assert fresh.slots is not None
        for mine, anew in (
            (batch.positions, fresh.positions),
            (batch.slots, fresh.slots),
            (batch.device_lengths, fresh.device_lengths),
            (batch.page_table, fresh.page_table),
        ):
            assert same_bits(mine, anew)
        assert list(batch.lengths) == list(fresh.lengths)
    cache.lengths = [2 * PAGE_SIZE, 9]
    with pytest.raises(TritiumError, match="do not fit the cache"):
        batch.step()


# Which path runs.


def test_auto_follows_the_weights_and_gradients() -> None:
    model = small()
    with torch.no_grad():
        assert model.kernels.name == "triton"
        assert model.use_backend("auto").kernels.name == ("triton" if DEVICE == "cuda" else "torch")
        assert model.use_backend("torch").kernels.name == "torch"
    assert model.use_backend("triton").kernels is differentiable_kernels(Modes())  # parameters want gradients
    with torch.no_grad(), pytest.raises(TritiumError, match=r"not torch\.float64"):
        _ = model.double().kernels


def test_an_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, or without Triton, asking for it raises and changes nothing."""
    model = small().use_backend("torch")
    monkeypatch.setattr("tritium.runtime.backend.obstacle", lambda device: "it needs a GPU that Triton drives")
    with pytest.raises(TritiumError, match="backend 'triton' cannot run here: it needs a GPU"):
        model.use_backend("triton")
    assert model.kernels is REFERENCE
