"""How the phases of the Triton path are put together: what each operation is handed. No kernel runs here."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime import backend as backends
from tritium.runtime.backend import Backend
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.errors import TritiumError
from tritium.runtime.generation import SamplingOptions, _uniforms, generate
from tritium.runtime.kernel_set import REFERENCE
from tritium.runtime.operations import DEFINITIONS
from tritium.runtime.registry import get_family
from tritium.runtime.triton_path import Modes, compose

from tests import oracle
from tests.rule import DEVICE
from tests.runtime.test_triton_path import SHAPE, cache_of, prompt, small

DEVICE_ = torch.device(DEVICE)
BIASED = {"mlp_bias": True, "qkv_bias": True, "out_bias": True}


@pytest.mark.parametrize("changes", [{}, BIASED], ids=["plain", "biased"])
@pytest.mark.parametrize("modes", [Modes(), Modes(batch_invariant=False)], ids=["invariant", "fastest"])
@pytest.mark.parametrize("family", ["qwen3", "mobilellm"])
def test_fills_the_cache_alike(family: str, modes: Modes, changes: dict[str, Any]) -> None:
    """Keys too: scores depend on differences of positions only, so that logits cannot show all of them shifted."""
    model = Decoder(get_family(family).spec_from(SHAPE, "test").replace(**changes), "torch")
    oracle.redraw(model, 2)
    model = model.to(DEVICE).eval()
    tokens, found = torch.tensor(prompt(9), device=DEVICE), []
    for kernels in (REFERENCE, compose("definitions", DEFINITIONS, modes)):
        cache = cache_of(model, 1)
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "kernels", kernels)
            for start, end in ((0, 4), (4, 8), (8, 9)):
                logits = model.run(model.bind(), tokens[start:end], Batch.appended(cache, [0], [end - start]))[1]
        found.append((logits, torch.stack(cache.keys), torch.stack(cache.values)))
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_as_the_trainer_without_batch_invariance() -> None:
    """The stronger promise implies the other."""
    model, ran = small().use_backend("torch"), set()

    def counting(name: str) -> Any:
        return lambda *args: (ran.add(name), getattr(DEFINITIONS, name)(*args))[1]

    counted: Any = SimpleNamespace(**{name: counting(name) for name in vars(DEFINITIONS)})
    cache, tokens = cache_of(model, 1), torch.tensor(prompt(4), device=DEVICE)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "kernels", compose("counted", counted, Modes(False, True)))
        model.run(model.bind(), tokens[:3], Batch.appended(cache, [0], [3]))
        model.run(model.bind(), tokens[3:], Batch.appended(cache, [0], [1]))
    linears = {"linear", "linear_residual", "linear_swiglu"}
    assert ran == {"rms_norm", "qk_norm_rope_cache", "paged_attention"} | linears


def test_positions_beyond_the_table_are_refused() -> None:
    """On the host: a kernel would read angles that are not there."""
    model, limit = small(num_layers=1), SHAPE["context_length"]
    attention = model.bind().layers[0].attention
    qkv = torch.zeros(limit + 1, (4 + 2 * 2) * 16, device=DEVICE)
    kernels = compose("definitions", DEFINITIONS, Modes())
    with torch.no_grad():
        q = kernels.qk_norm_rope_cache(qkv[:limit], attention, Batch.fresh([limit], DEVICE_))[0]
        assert q.shape[0] == limit
        with pytest.raises(TritiumError, match=f"exceed the context length of {limit}"):
            kernels.qk_norm_rope_cache(qkv, attention, Batch.fresh([limit + 1], DEVICE_))


def test_the_sample_phase_hands_on_every_setting() -> None:
    seen: list[tuple[Any, ...]] = []
    table: Any = SimpleNamespace(**{**vars(DEFINITIONS), "sample": lambda *args: seen.append(args)})
    args = (torch.zeros(1, 4), 0.7, 3, 0.9, torch.zeros(1))
    compose("recorded", table, Modes()).sample(*args)
    assert all(a is b for a, b in zip(seen.pop(), args, strict=True))


def test_a_step_behind_a_first_token_sees_it() -> None:
    """A prompt of one token is a prefill, whose kernels' bits it has; the token behind it is a decode step."""
    model = small(num_layers=1).use_backend("torch")
    tokens, logits = torch.tensor(prompt(3), device=DEVICE), []
    with torch.inference_mode():
        cache = cache_of(model, 1)
        for token in tokens[:2]:
            batch = Batch.appended(cache, [0], [1])
            assert batch.is_decode == bool(logits)
            logits.append(model.run(model.bind(), token[None], batch)[1])
        logits.append(model.run(model.bind(), tokens[2:], batch.step())[1])
        whole = model.run(model.bind(), tokens, Batch.fresh([3], DEVICE_))[1]
    torch.testing.assert_close(torch.cat(logits), whole, rtol=1e-5, atol=1e-5)


def test_gradients_on_a_gpu_take_the_kernels_that_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losing a gradient without a word would be the worst of all; a table of operations without any, the slowest."""
    monkeypatch.setattr(backends, "_obstacle", lambda device, dtype: None)

    def like(wants: bool) -> Any:
        return SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, requires_grad=wants)

    auto = Backend("auto")
    direct, differentiable = backends.triton_kernels(Modes()), backends.differentiable_kernels(Modes())
    assert direct is not differentiable
    assert auto.kernels(like(False), [like(False)]) is direct
    assert auto.kernels(like(True)) is differentiable
    assert auto.kernels(like(False), [like(False), like(True)]) is differentiable
    with torch.no_grad():
        assert auto.kernels(like(True), [like(True)]) is direct


def test_the_plain_interpreter_is_refused_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmended it computes bfloat16 on raw bits: tokens would be wrong without a word."""
    monkeypatch.setattr("tritium.kernels.launch.computes_bfloat16", lambda: False)
    backends._obstacle.cache_clear()
    try:
        with torch.no_grad(), pytest.raises(TritiumError, match="interpreter computes bfloat16 wrongly"):
            _ = small(dtype=torch.bfloat16).kernels
    finally:
        backends._obstacle.cache_clear()


def test_torch_does_not_promise_what_triton_does() -> None:
    for name in ("torch", "auto"):
        with pytest.raises(TritiumError, match=f"sampler_equals_trainer: backend '{name}' cannot promise it"):
            small().use_backend(name, sampler_equals_trainer=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"head_dim": 288}, "its heads are 288 wide, and the kernels hold 256"),
        ({"num_heads": 80, "num_kv_heads": 1}, "80 query heads share a key/value head, and the kernels hold 64"),
        (
            {"expert_layers": True, "num_experts": 1025, "experts_per_token": 2, "expert_dim": 1},
            "it has 1025 experts, and the kernels hold 1024",
        ),
    ],
    ids=["wide", "many", "experts"],
)
def test_shapes_that_the_kernels_do_not_hold(changes: dict[str, Any], said: str) -> None:
    """One line for `triton`; `auto` runs them all the same."""
    model = small(**changes)
    with torch.no_grad():
        with pytest.raises(TritiumError, match=f"cannot run this model: {said}"):
            _ = model.kernels
        assert model.use_backend("auto").kernels is REFERENCE


def test_each_step_draws_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = small(num_layers=1).use_backend("torch"), SamplingOptions(4, 1.0, seed=3)
    seen: list[Tensor] = []

    def recorded(*args: Any) -> Tensor:
        seen.append(args[-1].clone())
        return REFERENCE.sample(*args)

    monkeypatch.setattr(Decoder, "kernels", dataclasses.replace(REFERENCE, sample=recorded))
    list(generate(model, [prompt(3), prompt(2, 1)], options))
    expected = _uniforms(options, 2, model)
    assert expected is not None
    assert torch.equal(torch.stack(seen, 1), expected)
    assert expected.unique().numel() == 8


def test_a_step_reads_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what no dispatcher sees: `tolist`, `cpu` and `numpy`."""
    model = small(num_layers=1)
    cache = cache_of(model, 2)
    cache.lengths = [3, 7]
    with torch.inference_mode():
        batch = Batch.appended(cache, [0, 1], [1, 1])
        _ = batch.device_lengths, batch.page_table
        cache.advance([0, 1], [1, 1])

        def forbidden(*args: Any, **kwargs: Any) -> None:
            raise AssertionError("a decode step looks at the host")

        with monkeypatch.context() as patch:
            for name in ("tolist", "cpu", "numpy", "item"):
                patch.setattr(Tensor, name, forbidden)
            batch.step()
    assert batch.positions.tolist() == [4, 8]
