"""Loading in 8 and 4 bits: the right weights, whole models on both paths, little memory, refusals of one line."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Linear
from tritium.kernels.quantised_linear import dequantise_reference, quantise
from tritium.runtime import checkpoint, cli
from tritium.runtime.errors import TritiumError
from tritium.runtime.parallel.tensor import split_model
from tritium.runtime.quantisation import HEAD_BITS, SCHEMES, QuantisedLinear, Quantiser
from tritium.runtime.verify import verify

import tritium
from tests import oracle
from tests.rule import DEVICE, same_bits

DENSE = [
    oracle.Case("qwen3", 6, 2, 16, tied=True, layers=2, sharded=True),
    oracle.Case("qwen1", 3, 3, 16, tied=False, layers=2),
    oracle.Case("qwen2", 4, 1, 12, tied=True, layers=2),
    oracle.Case("llama", 6, 2, 8, tied=False, layers=2, what="biased"),
    oracle.Case("mobilellm", 4, 1, 56, tied=False, layers=2, sharded=True),
    oracle.Case("mobilellm1", 6, 2, 8, tied=True, layers=2, what="shared"),
    oracle.Case("gpt", 4, 4, 12, tied=True, layers=2),
    oracle.Case("gpt", 3, 3, 16, tied=False, layers=2, what="relu"),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        str(case): oracle.save(case, oracle.build(case), tmp_path_factory.mktemp("quantised") / "checkpoint")
        for case in DENSE
    }


def replaced(model: tritium.Decoder, dense: tritium.Decoder) -> tritium.Decoder:
    """The dense model with the weights that a quantised one stores."""
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, linear in dense.named_modules():
            if isinstance(linear, Linear):
                module = modules[name]
                weight = dequantise_reference(module.values, module.scale)[:, : module.width]
                linear.weight.copy_(weight)
    return dense


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_every_projection_is_stored_in_few_bits(case: oracle.Case, scheme: str, checkpoints: dict[str, Path]) -> None:
    """Bit for bit what `quantise` makes of the loaded weight, in its place; nothing else changes."""
    options = {"device": DEVICE, "dtype": "float32", "progress": False}
    dense = tritium.load(checkpoints[str(case)], **options)[0]
    model = tritium.load(checkpoints[str(case)], quantise=scheme, **options)[0]
    modules = dict(model.named_modules())
    for name, module in dense.named_modules():
        if isinstance(module, Linear):
            assert isinstance(modules[name], QuantisedLinear)
            found = quantise(module.weight, HEAD_BITS if name == "head" else SCHEMES[scheme])
            assert same_bits(modules[name].values, found.values)
            assert same_bits(modules[name].scale, found.scale)
            assert (modules[name].bias is None) == (module.bias is None)
            assert module.bias is None or same_bits(modules[name].bias, module.bias)
    others = dict(model.named_parameters())
    assert len(others) > 2
    assert all(same_bits(parameter, dense.get_parameter(name)) for name, parameter in others.items())
    if case.tied:
        assert same_bits(model.head.values, quantise(dense.embedding.weight, HEAD_BITS).values)
    assert model.num_parameters() == dense.num_parameters()
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", DENSE, ids=str)
def test_the_pytorch_path_computes_with_what_is_stored(
    case: oracle.Case, scheme: str, checkpoints: dict[str, Path]
) -> None:
    """Logits, loss and greedy tokens of the dense model whose weights are the dequantised ones."""
    options = {"device": DEVICE, "dtype": "float32", "backend": "torch", "progress": False}
    model = tritium.load(checkpoints[str(case)], quantise=scheme, **options)[0]
    dense = tritium.load(checkpoints[str(case)], **options)[0]
    x = oracle.tokens(2, 9).to(DEVICE)
    with torch.inference_mode():
        untouched = dense(x).logits
        if case.tied:  # the head's copy, and not the embedding, is quantised
            dense.head = Linear(*dense.embedding.weight.shape[::-1], bias=False, device=DEVICE)
        expected = replaced(model, dense)(x, labels=x)
        found = model(x, labels=x)
        torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=1e-4)
        assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-4)
        assert model(x, labels=x, return_logits=False).loss.item() == pytest.approx(found.loss.item(), abs=1e-4)
        assert not torch.allclose(found.logits, untouched, atol=2e-3)
    assert torch.equal(model.generate(x, 5, temperature=0), dense.generate(x, 5, temperature=0))


@pytest.mark.parametrize(("scheme", "dtype"), [("int8", "bfloat16"), ("int4", "float32")])
def test_both_paths_agree(scheme: str, dtype: str, tmp_path: Path) -> None:
    """Every operation by the rule, both paths as wholes, and the same greedy tokens."""
    case = oracle.Case("qwen3", 4, 2, 16, tied=scheme == "int8", layers=1)
    saved = oracle.save(case, oracle.build(case), tmp_path / "checkpoint")
    model = tritium.load(saved, quantise=scheme, device=DEVICE, dtype=dtype, progress=False)[0]
    report = verify(model, oracle.tokens(1, 5)[0].tolist(), 3)
    assert report.problems == []
    names = {row.operation for row in report.rows}
    assert {"quantised_linear", "norm_linear", "norm_linear_swiglu", "decode_linear_residual"} <= names
    assert not {"linear", "linear_residual", "linear_swiglu"} & names
    assert "3 greedy tokens" in report.greedy or dtype == "bfloat16"


def test_a_model_may_change_its_dtype_and_not_its_scales(checkpoints: dict[str, Path]) -> None:
    """Scales that were rounded to bfloat16 would no longer be those of the values."""
    model = tritium.load(checkpoints[str(DENSE[0])], quantise="int8", device=DEVICE, progress=False, dtype="float32")[0]
    scale = model.stack.layers[0].mlp.up.scale.clone()
    x = oracle.tokens(1, 9).to(DEVICE)
    expected = model(x).logits
    model.to(torch.bfloat16)
    assert same_bits(model.stack.layers[0].mlp.up.scale, scale)
    found = model.use_backend("torch")(x).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).square().mean() < 1e-3 * expected.square().mean()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_random_weights_are_those_of_the_dense_model(scheme: str) -> None:
    spec = tritium.load_config("models/qwen3/0.6B.yaml").replace(
        num_layers=2, vocab_size=96, embedding_dim=32, hidden_dim=48, num_heads=4, num_kv_heads=2, head_dim=16
    )
    dense = tritium.load_model(spec, "qwen3", device=DEVICE, dtype="bfloat16", seed=3)
    model = tritium.load_model(spec, "qwen3", device=DEVICE, dtype="bfloat16", seed=3, quantise=scheme)
    assert model.quantisation == scheme
    for name, module in dense.named_modules():
        if isinstance(module, Linear):
            assert same_bits(model.get_submodule(name).values, quantise(module.weight, SCHEMES[scheme]).values)
    assert same_bits(model.embedding.weight, dense.embedding.weight)
    assert same_bits(model.head.values, quantise(dense.embedding.weight, HEAD_BITS).values)
    assert model.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_hardly_a_weight_is_ever_there_unquantised(
    case: oracle.Case, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is allocated first is what stays; a dense weight is there from its first piece to its last."""
    allocated, waiting = [], []
    allocate, fill = checkpoint.allocate, Quantiser.fill

    def recording(model: tritium.Decoder, device: Any) -> None:
        allocated.append(sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())))
        allocate(model, device)

    def filling(self: Quantiser, *args: Any) -> None:
        fill(self, *args)
        waiting.append(set(self._waiting))

    monkeypatch.setattr(checkpoint, "allocate", recording)
    monkeypatch.setattr(Quantiser, "fill", filling)
    model = tritium.load(checkpoints[str(case)], quantise="int4", device="cpu", progress=False)[0]
    assert allocated == [sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))]
    assert waiting[-1] == set()
    assert max(map(len, waiting)) <= 2


def test_refusals_are_one_line(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Each says what cannot be combined, and what would be right."""
    saved = checkpoints[str(DENSE[0])]
    load = {"device": DEVICE, "progress": False}
    model = tritium.load(saved, quantise="int8", **load)[0]
    x = oracle.tokens(1, 5).to(DEVICE)
    experts = oracle.Case("qwen3_moe", 4, 2, 16, tied=True, layers=2)
    mixture = oracle.save(experts, oracle.build(experts), tmp_path / "experts")
    again = "not for a quantised model; load it without quantise='int8'"
    for call, message in (
        (
            lambda: tritium.load(saved, quantise="int3", **load),
            "quantise: unknown 'int3'; did you mean int8 or int4",
        ),
        (lambda: tritium.load_model(model.config, quantise="fp8"), "quantise: unknown 'fp8'; "),
        (lambda: tritium.load(mixture, quantise="int8", **load), "quantise: a mixture of experts cannot be quantised"),
        (lambda: tritium.add_lora(model), f"LoRA: {again}"),
        (lambda: tritium.load_adapter(model, tmp_path), f"LoRA: {again}"),
        (lambda: tritium.save_pretrained(model, tmp_path / "out"), f"save_pretrained: {again}"),
        (lambda: model.initialise(), f"initialise: {again}"),
        (lambda: split_model(model, 0, 2, None), f"tensor parallelism: {again}"),
        (lambda: model.requires_grad_()(x), f"training: {again}"),
    ):
        with pytest.raises(TritiumError) as caught:
            call()
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_no_number_is_named(bad: float, tied: bool, tmp_path: Path) -> None:
    case = oracle.Case("qwen3", 4, 2, 16, tied=tied, layers=2)
    twin = oracle.build(case)
    weight = twin.model.embed_tokens.weight if tied else twin.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight[5, 7] = bad
    name = "embedding.weight" if tied else "stack.layers.1.mlp.up.weight"
    with pytest.raises(TritiumError, match=f"quantise: {name} has NaN or infinity in it and cannot be quantised"):
        tritium.load(oracle.save(case, twin, tmp_path / "c"), quantise="int4", device=DEVICE, progress=False)


def test_the_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model talks in few bits, and in those asked for; a wrong scheme is one line and exit code 2."""
    asked: list[str] = []

    class Recording(Quantiser):
        def __init__(self, model: tritium.Decoder, scheme: str, *rest: Any) -> None:
            asked.append(scheme)
            super().__init__(model, scheme, *rest)

    monkeypatch.setattr(checkpoint, "Quantiser", Recording)
    for command in ("generate", "chat"):
        for scheme in SCHEMES:
            options = ["--prompt", "ROMEO:", "--max-new-tokens", "4", "--device", DEVICE, "--quantise", scheme]
            assert cli.main([command, *options]) == 0
            assert len(capsys.readouterr().out.strip()) > 1
    assert asked == ["int8", "int4"] * 2
    assert cli.main(["generate", "--prompt", "x", "--quantise", "int7"]) == 2
    assert "quantise: unknown 'int7'; did you mean int8 or int4" in capsys.readouterr().err
