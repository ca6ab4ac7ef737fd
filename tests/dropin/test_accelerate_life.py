"""What else a model goes through: reports, copies, files, hooks, checkpointing, autocast, dispatch, what cannot be."""

import copy
import inspect
import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_module
from torch import nn

import tritium
from tests import oracle
from tests.dropin.accelerated import SMALL, WINDOW, assert_near, build, launch, results

X = oracle.tokens(2, 9)
QWEN, LLAMA4, GPT = SMALL[1], SMALL[4], SMALL[5]


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "obstacle", lambda *args: "none shall run")


def logits(model: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(X, **inputs).logits
    return found


def forwards(model: Any) -> dict[str, Any]:
    """What lies on each module itself."""
    return {name: set(module.__dict__) for name, module in model.named_modules()}


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_report_names_every_module_once(case: oracle.Case) -> None:
    model = build(case)
    before = forwards(model)
    report = tritium.accelerate(model)
    assert set(report.patched) | set(report.left) == set(dict(model.named_modules()))
    assert set(report.patched) & set(report.left) == set()
    changed = {name for name, found in forwards(model).items() if "forward" in found}
    assert changed <= set(report.patched)
    functions = {name for name, what in report.patched.items() if what.startswith(("our", "the loss"))}
    assert set(report.patched) - functions == changed - functions
    text = str(report)
    assert f"{len(report.patched)} of {len(before)} modules patched" in text
    assert "nothing gets faster" in text
    assert text.count("x Linear") == 1
    again = tritium.accelerate(model)
    assert again.already
    assert (again.patched, again.left) == (report.patched, report.left)
    assert "already" in str(again)
    again.undo()
    assert forwards(model) == before
    report.undo()  # harmless
    assert forwards(model) == before


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_the_operations_run(case: oracle.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the classes' own code: by the operations that are called."""
    model, called = build(case, **(WINDOW if case.family in ("qwen2", "qwen3") else {})), []
    tritium.accelerate(model)
    monkeypatch.setattr("tritium.runtime.dropin.attention._sdpa", lambda *args, **kwargs: 1 // 0)
    names = ("rms_norm", "layer_norm", "add_rms_norm", "silu_mul", "qk_norm_rope", "cross_entropy")

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            called.append(name)
            return getattr(torch.ops.tritium, name)

    for module in ("patches", "losses"):
        monkeypatch.setattr(f"tritium.runtime.dropin.{module}.OPERATIONS", Recorded())
    model(X, labels=X)
    count = {name: called.count(name) for name in names if name in called}
    gated = {"add_rms_norm": 2, "silu_mul": 2, "qk_norm_rope": 4, "rms_norm": 3, "cross_entropy": 1}
    if case.family == "gpt":
        gated = {"layer_norm": 5, "cross_entropy": 1}
    elif case.family == "qwen3_moe":
        del gated["silu_mul"]
    assert count == gated


def test_copies_are_models_of_their_own() -> None:
    """A copy runs on its own weights, says so, and is undone alone."""
    model = build(QWEN)
    plain = logits(model)
    report = tritium.accelerate(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    assert not torch.equal(logits(copied), logits(model))
    fresh = build(QWEN)
    fresh.load_state_dict(copied.state_dict())
    torch.testing.assert_close(logits(copied), logits(fresh), atol=1e-5, rtol=1e-5)
    found = tritium.accelerate(copied)
    assert found.already
    report.undo()
    assert torch.equal(logits(model), plain)
    assert "forward" in copied.model.norm.__dict__
    assert copied.config._attn_implementation == "tritium"
    found.undo()
    assert torch.equal(logits(copied), logits(fresh))


def test_a_model_of_the_same_config_stays_as_it_is() -> None:
    config = build(QWEN).config
    one, other = hf.Qwen3ForCausalLM(config), hf.Qwen3ForCausalLM(config)
    report = tritium.accelerate(one)
    assert other.config is config
    assert other.config._attn_implementation == "eager"
    assert one.config is one.model.layers[1].self_attn.config
    one.config.use_cache = False
    report.undo()
    assert one.config._attn_implementation == "eager"
    assert one.config.use_cache is False  # what was changed meanwhile stays


@pytest.mark.parametrize("case", [QWEN, GPT], ids=str)
def test_files(case: oracle.Case, tmp_path: Path) -> None:
    """What is saved is what the untouched model saves; a pickled model comes back untouched and can be accelerated."""
    model = build(case)
    model.save_pretrained(tmp_path / "before")
    tritium.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes(), path.name
    again = type(model).from_pretrained(tmp_path / "after", attn_implementation="eager")
    torch.testing.assert_close(logits(again), logits(model), atol=1e-5, rtol=1e-5)
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    read = torch.load(whole, weights_only=False)
    torch.testing.assert_close(logits(read), logits(model), atol=1e-5, rtol=1e-5)
    assert not tritium.accelerate(read).already
    torch.testing.assert_close(logits(read), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", [QWEN, LLAMA4, GPT], ids=str)
def test_gradient_checkpointing(case: oracle.Case, reentrant: bool) -> None:
    still = {f"{part}_pdrop": 0.0 for part in ("attn", "embd", "resid")} if case is GPT else {}
    model = build(case, **still).train()
    expected = results(model, X)
    report = tritium.accelerate(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    first = model.get_submodule("transformer.h.0.attn.c_attn" if case is GPT else "model.layers.0.self_attn.q_proj")
    handle = first.register_forward_hook(lambda *args: calls.append(1))
    assert_near(results(model, X, use_cache=False), expected)
    assert len(calls) == 2  # once more in the backward pass
    handle.remove()
    report.undo()


def test_dropout_in_training() -> None:
    """Of the attention's weights, by a function that has it: different each time, with the mean of none."""
    model = build(QWEN, attention_dropout=0.3)
    tritium.accelerate(model)
    still = logits(model)
    model.train()
    torch.manual_seed(0)
    first, second = logits(model), logits(model)
    assert (first - second).abs().max() > 0.05
    assert (first - still).abs().max() > 0.05
    torch.manual_seed(0)
    assert torch.equal(logits(model), first)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_hidden_states_and_attention_weights(case: oracle.Case) -> None:
    model = build(case)
    expected = model(X, output_hidden_states=True, output_attentions=True)
    report = tritium.accelerate(model)
    for inputs in ({"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
        found = model(X, **inputs)
        assert len(found.hidden_states) == 3
        for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert model.config._attn_implementation == "tritium"
    report.undo()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_generate_gives_attention_weights(case: oracle.Case, cache: str) -> None:
    """With a static cache the masks are made for our attention before the model is called."""
    model = build(case)
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    how |= {"output_attentions": True, "return_dict_in_generate": True, "disable_compile": True}
    padding = torch.ones_like(X)
    padding[0, :2] = 0
    expected = model.generate(X, attention_mask=padding, **how)
    report = tritium.accelerate(model)
    found = model.generate(X, attention_mask=padding, **how)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one[:, :, -1], other[:, :, -1], atol=1e-5, rtol=1e-5)
    report.undo()


def test_hooks_are_called() -> None:
    """On a norm whose work its layer would do: watched, and what a hook gives is taken."""
    model = build(QWEN)
    tritium.accelerate(model)
    layer = model.model.layers[0]
    plain = logits(model)
    for part in (layer.post_attention_layernorm, layer.self_attn.q_norm, layer.mlp, layer.self_attn.v_proj):
        handle = part.register_forward_hook(lambda module, args, output: output * 1.5)
        assert (logits(model) - plain).abs().max() > 1e-3
        handle.remove()
    torch.testing.assert_close(logits(model), plain, atol=0.0, rtol=0.0)
    kept = layer.post_attention_layernorm
    layer.post_attention_layernorm = Doubled(kept)
    assert (logits(model) - plain).abs().max() > 1e-3
    layer.post_attention_layernorm = kept
    report = tritium.accelerate(model)
    report.undo()
    handle = layer.post_attention_layernorm.register_forward_pre_hook(lambda module, args: None)
    report = tritium.accelerate(model)
    assert "has hooks" in report.left["model.layers.0"]
    assert "model.layers.1" in report.patched
    handle.remove()


@pytest.mark.parametrize("first", ["dispatched", "accelerated"])
def test_placed_by_a_device_map(first: str) -> None:
    """accelerate's hooks lie around ours, whichever came first; and are taken off."""
    model = build(QWEN)
    expected, plain = results(model, X), logits(model)
    place = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm"), "cpu")
    place |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch = partial(dispatch_model, model, device_map=place, main_device="cpu", force_hooks=True)
    if first == "dispatched":
        dispatch()
        report = tritium.accelerate(model)
    else:
        report = tritium.accelerate(model)
        dispatch()
    for layer in model.model.layers:
        assert isinstance(layer.mlp.forward, partial)  # accelerate's
        assert getattr(layer.mlp._old_forward.__func__, "_tritium", False)
    assert_near(results(model, X), expected)
    assert len(report.patched) > 10
    report.undo()
    assert torch.equal(logits(model), plain)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model), plain)
    assert not any("tritium" in str(value) for module in model.modules() for value in module.__dict__.values())


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_autocast_and_other_dtypes(case: oracle.Case) -> None:
    """As near to the truth as the untouched model is there."""
    model = build(case, experts_implementation="eager")  # the other refuses float64
    truth = logits(oracle.copied(model, torch.float64))

    def errors() -> list[float]:
        with torch.autocast("cpu", torch.bfloat16):
            cast = logits(model)
            loss = model(X, labels=X).loss
        loss.backward()
        half, double = (logits(oracle.copied(model, dtype)) for dtype in (torch.bfloat16, torch.float64))
        return [(found - truth).double().square().mean().sqrt().item() for found in (cast, half, double)]

    expected = errors()
    tritium.accelerate(model)
    found = errors()
    assert found[0] <= 1.2 * expected[0]
    assert found[1] <= 1.2 * expected[1]
    assert found[2] < 1e-6  # eager attention has float32 in it even there


def test_other_heads() -> None:
    for kind in (hf.Qwen3ForSequenceClassification, hf.Qwen3Model, hf.Qwen3ForTokenClassification):
        torch.manual_seed(0)
        model = kind(build(QWEN).config)
        oracle.redraw(model.eval(), 0)
        x = X.clamp(min=1)
        expected = model(x)[0]
        report = tritium.accelerate(model)
        torch.testing.assert_close(model(x)[0], expected, atol=1e-5, rtol=1e-5)
        assert len(report.patched) > 10
        report.undo()


def test_generate_sees_the_signature_it_knows() -> None:
    model = build(QWEN)
    before = [inspect.signature(module.forward) for module in model.modules()]
    tritium.accelerate(model, logits=False)
    assert [inspect.signature(module.forward) for module in model.modules()] == before


def test_a_partly_known_model_says_what_is_left() -> None:
    model = build(QWEN, hidden_act="gelu")
    model.model.layers[1].self_attn = Odd(model.model.layers[1].self_attn)
    model.model.norm = nn.LayerNorm(48)
    model.model.layers[0].input_layernorm.forward = lambda x: x
    expected = logits(model)
    report = tritium.accelerate(model)
    assert report.left["model.layers.0.mlp"] == "its activation is GELUActivation, not silu"
    assert report.left["model.layers.0.input_layernorm"] == "its forward has been replaced by something else"
    assert report.left["model.layers.1.self_attn"] == "no operation of ours does what it does"
    assert "model.norm" in report.left
    assert "model.layers.0.self_attn" in report.patched
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert "left as they are" in str(report)
    report.undo()
    assert torch.equal(logits(model), expected)


def test_a_rotation_that_another_attention_uses_is_left() -> None:
    """Which would not know what to do with its table."""
    model = build(QWEN)
    odd = model.model.layers[1].self_attn
    odd.forward = partial(type(odd).forward, odd)
    expected = logits(model)
    report = tritium.accelerate(model)
    assert report.left["model.rotary_emb"] == "model.layers.1.self_attn, which uses it, is left as it is"
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


class Doubled(nn.Module):
    """A norm of another kind, with a weight of its own."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
        self.inner = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.inner(x)  # type: ignore[no-any-return]


class Odd(nn.Module):
    """Somebody's own attention."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def test_what_keeps_its_own_function() -> None:
    """Of attention or of experts alone: the other's is ours all the same."""
    for changes, left in (({"output_attentions": True}, "self_attn"), ({"hidden_act": "gelu"}, "mlp.experts")):
        model = build(SMALL[2], **changes)
        expected = logits(model)
        report = tritium.accelerate(model)
        implementations = (model.config._attn_implementation, model.config._experts_implementation)
        assert (left == "self_attn", left != "self_attn") == tuple(name != "tritium" for name in implementations)
        said = {**report.left, **report.patched}[f"model.layers.0.{left}"]
        assert "our" not in said
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
        report.undo()
        assert "tritium" not in (model.config._attn_implementation, model.config._experts_implementation)
    gpt = build(GPT, reorder_and_upcast_attn=True)
    assert "in float32, reordered" in tritium.accelerate(gpt).left["transformer.h.0.attn"]


def test_refuses_what_it_cannot_do() -> None:
    bert = hf.BertModel(hf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8))
    with pytest.raises(tritium.TritiumError, match=r"nothing of this BertModel can be patched; known are Qwen2, Qwen3"):
        tritium.accelerate(bert)
    assert not hasattr(bert, "_tritium")
    for wrong in (nn.Linear(2, 2), None, "Qwen/Qwen3-0.6B"):
        with pytest.raises(tritium.TritiumError, match="takes a model of transformers, got"):
            tritium.accelerate(wrong)
    model = build(QWEN)
    tritium.accelerate(model)
    with pytest.raises(tritium.TritiumError, match="accelerated with logits=True: undo that first"):
        tritium.accelerate(model, logits=False)
