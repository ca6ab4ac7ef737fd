"""attn_implementation="tritium": every architecture against its eager self, padding, windows, caches, gradients, what
is left to sdpa, and bits that a row has alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from tritium.runtime.dropin import attention
from tritium.runtime.errors import TritiumError

import tritium

from ..oracle import CASES, Case, build, tokens
from ..rule import same_bits

CLOSE = {"rtol": 0, "atol": 1e-5}
SHAPES = [case for case in CASES if case.family not in ("qwen1", "mobilellm1") and not case.sharded]
TINY = Case("qwen3", 4, 2, 16, tied=True, layers=2)
SHORT = Case("qwen3", 4, 2, 16, tied=True, layers=1)  # to compile
WINDOWED = Case("qwen2", 4, 2, 16, tied=True, layers=3)
WINDOW = 5
Model = hf.PreTrainedModel


@pytest.fixture(autouse=True)
def registered() -> None:
    tritium.register_transformers()


@pytest.fixture
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")


@pytest.fixture
def no_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left to sdpa fails: so nothing is."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("left to sdpa")

    monkeypatch.setattr(attention, "_sdpa", refuse)


def windowed(**changes: Any) -> Model:
    """Qwen2 whose layers beyond the first see a window."""
    return build(WINDOWED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1, **changes)


def padded(kind: str, rows: int = 3, length: int = 9) -> Tensor:
    mask = torch.ones(rows, length, dtype=torch.long)
    if kind in ("left", "both"):
        mask[0, :4] = 0
    if kind in ("right", "both"):
        mask[1, 6:] = 0
    if kind == "both":
        mask[2, :2] = mask[2, 8:] = 0
    return mask


def in_both(model: Model, run: Callable[[], Any]) -> tuple[Any, Any]:
    """(what eager gives, what we give)."""
    model.set_attn_implementation("eager")
    expected = run()
    model.set_attn_implementation("tritium")
    return expected, run()


def logits_of(model: Model, *args: Any, **kwargs: Any) -> Callable[[], Tensor]:
    @torch.no_grad()
    def run() -> Tensor:
        found: Tensor = model(*args, **kwargs).logits
        return found

    return run


@pytest.mark.usefixtures("definitions", "no_sdpa")
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_logits(case: Case) -> None:
    """A whole forward, padded on neither, either and both sides."""
    model, ids = build(case), tokens(3, 9)
    for kind in ("", "left", "right", "both"):
        mask = padded(kind)
        expected, got = in_both(model, logits_of(model, ids, attention_mask=mask if kind else None))
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.usefixtures("definitions", "no_sdpa")
@pytest.mark.parametrize("kind", ["", "left", "both"])
def test_windows(kind: str) -> None:
    """Layers with and without one; a wrong one is seen."""
    model, ids, mask = windowed(), tokens(3, 9), padded(kind)
    expected, got = in_both(model, logits_of(model, ids, attention_mask=mask))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and WINDOW + 1
    assert (logits_of(model, ids, attention_mask=mask)()[mask.bool()] - expected[mask.bool()]).abs().max() > 1e-3


def through_cache(
    model: Model, cache: Any, ids: Tensor, mask: Tensor | None, pieces: list[int]
) -> Callable[[], Tensor]:
    """The logits of a prompt in pieces, the last ones of a token each."""

    @torch.no_grad()
    def run() -> Tensor:
        held, end, found = cache(), 0, []
        for piece in pieces:
            begin, end = end, end + piece
            seen = None if mask is None else mask[:, :end]
            positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
            step = model(ids[:, begin:end], attention_mask=seen, position_ids=positions, past_key_values=held)
            found.append(step.logits)
        return torch.cat(found, 1)

    return run


@pytest.mark.usefixtures("definitions", "no_sdpa")
@pytest.mark.parametrize("kind", ["", "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("form", ["gpt", "mobilellm", "windowed"])
def test_caches_over_chunks_and_steps(form: str, cache: str, kind: str) -> None:
    """Prefill in two pieces, then steps, past the window; sliding caches keep only their window's keys."""
    families = {"gpt": Case("gpt", 4, 4, 12, tied=True), "mobilellm": Case("mobilellm", 4, 2, 16, tied=True)}
    model = windowed() if form == "windowed" else build(families[form])
    ids, mask = tokens(3, 14), padded("left", length=14) if kind else None

    def fresh() -> Any:
        return hf.DynamicCache(config=model.config) if cache == "dynamic" else hf.StaticCache(model.config, 20)

    expected, got = in_both(model, through_cache(model, fresh, ids, mask, [7, 4, 1, 1, 1]))
    real = torch.ones(3, 14, dtype=torch.bool) if mask is None else mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"prompt_lookup_num_tokens": 3}]
)
def test_generation(options: dict[str, Any]) -> None:
    model, batch = build(TINY), 1 if "prompt_lookup_num_tokens" in options else 3
    ids, mask = tokens(batch, 9), padded("left" if batch > 1 else "", batch)

    def run() -> Tensor:
        torch.manual_seed(0)
        found: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=8, **{"do_sample": False, **options})
        return found

    expected, got = in_both(model, run)
    assert torch.equal(got, expected)


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Those that a real token predicts: what padding predicts, each implementation has its own."""
    behind_padding = torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0
    return ids.masked_fill((mask == 0) | behind_padding, -100)


def gradients(model: Model, ids: Tensor, mask: Tensor) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=labels_of(ids, mask)).loss
        loss.backward()
        return [loss, *(parameter.grad for parameter in model.parameters())]

    return run


@pytest.mark.usefixtures("definitions", "no_sdpa")
@pytest.mark.parametrize("kind", ["left", "both"])
@pytest.mark.parametrize(
    "form", [*[case for case in SHAPES if case.layers < 4][1::3], "windowed", "checkpointed"], ids=str
)
def test_gradients(form: Any, kind: str) -> None:
    model = windowed() if form == "windowed" else build(TINY if form == "checkpointed" else form)
    if form == "checkpointed":
        model.train().gradient_checkpointing_enable()
    for mine, eager in zip(*reversed(in_both(model, gradients(model, tokens(3, 9), padded(kind)))), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)


def test_interpreted_kernels(no_sdpa: None) -> None:
    """Prefill, a step and gradients by the kernels themselves."""
    model, ids, mask = build(TINY), tokens(2, 8), padded("left", 2, 8)

    def cache() -> Any:
        return hf.DynamicCache(config=model.config)

    expected, got = in_both(model, through_cache(model, cache, ids, mask, [7, 1]))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    for mine, eager in zip(*reversed(in_both(model, gradients(model, ids, mask))), strict=True):
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-5)


def test_a_padded_row_has_the_bits_of_the_row_alone() -> None:
    """Of attention: what a model's other layers give in a batch is theirs to say."""
    q, k, v = (torch.randn(2, heads, 8, 16, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2, 3))
    v = v[:, :2]
    module = torch.nn.Module()
    for queries in (8, 3, 1):
        bounds = torch.tensor([[0, 8], [5, 3]], dtype=torch.int32).view(2, 1, 1, 2)
        got, _ = attention.attention_forward(module, q[:, :, -queries:], k, v, bounds)
        seeing = min(queries, 3)
        alone = torch.tensor([0, 3], dtype=torch.int32).view(1, 1, 1, 2)
        row = q[1:, :, -seeing:], k[1:, :, 5:], v[1:, :, 5:]
        if queries > 1 and seeing == 1:
            continue
        assert same_bits(got[1, queries - seeing :], attention.attention_forward(module, *row, alone)[0][0])
        assert got[1, : queries - seeing].eq(0).all()


# What is left to sdpa.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that sdpa was called with."""
    masks: list[Any] = []
    original = attention._sdpa

    def count(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        return original(module, q, k, v, mask, **kwargs)

    monkeypatch.setattr(attention, "_sdpa", count)
    return masks


@pytest.mark.usefixtures("definitions")
@pytest.mark.parametrize(
    "what", ["packed", "holes", "bool", "float", "float64", "holes windowed", "steps after padding"]
)
def test_what_sdpa_computes(what: str, counted: list[Any]) -> None:
    model = windowed() if "windowed" in what else build(TINY)
    model = model.double() if what == "float64" else model
    ids, mask, given = tokens(2, 9), torch.ones(2, 9, dtype=torch.long), {}
    if what == "packed":
        given = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2]]).repeat(2, 1), "use_cache": False}
    elif "holes" in what:
        mask[0, 3:5] = 0
        given = {"attention_mask": mask}
    elif what in ("bool", "float"):
        seen = torch.ones(9, 9).tril().bool() & (torch.rand(9, 9, generator=torch.Generator().manual_seed(1)) > 0.3)
        seen = (seen | torch.eye(9).bool()).expand(2, 1, 9, 9)
        floats = torch.zeros(2, 1, 9, 9).masked_fill(~seen, torch.finfo(torch.float32).min)
        given = {"attention_mask": floats}
    expected, got = in_both(model, logits_of(model, ids, **given))
    if what == "bool":
        got = logits_of(model, ids, attention_mask=seen)()
    if what == "steps after padding":  # right padding that new tokens follow is a hole
        mask[1, 4:7] = 0
        run = through_cache(model, lambda: hf.DynamicCache(config=model.config), ids, mask, [7, 1, 1])
        expected, got = in_both(model, run)
    real = mask.bool()
    torch.testing.assert_close(got[real], expected[real], **CLOSE)
    assert counted
    assert not any(attention.is_bounds(mask) for mask in counted)


@pytest.mark.usefixtures("definitions")
def test_dropout_is_sdpas_and_drops(counted: list[Any]) -> None:
    """With bounds made a mask: a dropout of next to nothing changes next to nothing."""
    model, ids, mask = windowed(attention_dropout=1e-7), tokens(3, 9), padded("both")
    model.train()
    expected, got = in_both(model, logits_of(model, ids, attention_mask=mask))
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)
    assert len(counted) == 3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert (logits_of(model, ids, attention_mask=mask)() - got).abs().max() > 0.01


@pytest.mark.usefixtures("definitions")
def test_gradients_through_a_cache(counted: list[Any]) -> None:
    """As prefix tuning has them."""
    model, ids = build(TINY), tokens(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0

    def run() -> Tensor:
        model.zero_grad()
        cache = hf.DynamicCache(config=model.config)
        model(ids[:, :3], attention_mask=mask[:, :3], past_key_values=cache)
        model(ids[:, 3:], attention_mask=mask, past_key_values=cache).logits.square().mean().backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    expected, got = in_both(model, run)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    assert counted


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_what_sdpa_would_leave_out_is_refused(name: str) -> None:
    x = torch.zeros(1, 1, 2, 16)
    with pytest.raises(TritiumError, match=f"{name}.*eager"):
        attention.attention_forward(torch.nn.Module(), x, x, x, None, **{name: torch.ones(1)})


def test_cross_attention_is_sdpas(counted: list[Any]) -> None:
    """No mask and not causal: every key is seen."""
    module = torch.nn.Module()
    module.is_causal = False  # type: ignore[assignment]
    q, k = torch.randn(2, 4, 3, 16), torch.randn(2, 4, 3, 16)
    got, _ = attention.attention_forward(module, q, k, k, None)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    assert len(counted) == 1


# torch.compile.


@pytest.mark.usefixtures("definitions", "no_sdpa")
def test_a_step_over_a_static_cache_is_one_graph() -> None:
    """Masks made beforehand, as `generate` does, and made within; the graph serves every length."""
    model, ids, mask = build(SHORT), tokens(2, 12), padded("left", 2, 12)
    model.set_attn_implementation("tritium")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of other tests' graphs
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for seen in (None, mask):
            cache = hf.StaticCache(model.config, 16)
            logits = [
                model(ids[:, :8], attention_mask=None if seen is None else seen[:, :8], past_key_values=cache).logits
            ]
            for at in range(8, 12):
                bounds = None
                if seen is not None:
                    bounds = attention.mask(
                        batch_size=2, q_length=1, kv_length=16, q_offset=at, kv_offset=0,
                        mask_function=attention._masks.causal_mask_function, attention_mask=seen[:, : at + 1].bool(),
                    )  # fmt: skip
                    assert attention.is_bounds(bounds)
                logits.append(step(ids[:, at : at + 1], attention_mask=bounds, past_key_values=cache).logits)
            whole = model(ids, attention_mask=seen).logits
            real = torch.ones(2, 12, dtype=torch.bool) if seen is None else mask.bool()
            torch.testing.assert_close(torch.cat(logits, 1)[real], whole[real], **CLOSE)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.usefixtures("definitions")
def test_training_is_one_graph() -> None:
    model, ids, mask = build(SHORT), tokens(3, 9), padded("left")
    model.set_attn_implementation("tritium")
    expected = gradients(model, ids, mask)()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(ids, attention_mask=mask, labels=labels_of(ids, mask), use_cache=False).loss
    loss.backward()
    for mine, theirs in zip([loss, *(p.grad for p in model.parameters())], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("definitions")
def test_generate_with_a_static_cache() -> None:
    model, ids, mask = build(Case("llama", 3, 3, 16, tied=True, layers=2)), tokens(3, 9), padded("left")

    def run() -> Tensor:
        found: Tensor = model.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, cache_implementation="static"
        )
        return found

    expected, got = in_both(model, run)
    assert torch.equal(got, expected)
