"""The mapping for the `kernels` package: what its rules ask of a layer, the layer against transformers' own, its gate.

The package itself is no part of the tests' environment; how it puts a layer into a model is done here by hand.
"""

import inspect
from types import MethodType

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.utils import import_utils
from tritium.runtime.dropin import hub_kernels
from tritium.runtime.errors import TritiumError

import tritium

from ..oracle import Case, build, tokens


@pytest.fixture
def mapping(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, hub_kernels.Layer]]:
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: True)
    return tritium.kernel_mapping()  # type: ignore[no-any-return]


def test_layers_keep_the_packages_rules(mapping: dict[str, dict[str, hub_kernels.Layer]]) -> None:
    """Stateless, no members of its own, the signature of what it replaces; repositories that can be keys."""
    assert set(mapping) == {"RMSNorm"}
    for name, devices in mapping.items():
        assert set(devices) == {"cuda", "rocm", "cpu"}
        assert len(set(devices.values())) == 1
        assert devices["cuda"].layer_name == name
        layer = devices["cuda"].load()
        assert issubclass(layer, nn.Module)
        assert layer.__init__ is nn.Module.__init__
        extra = {key for key, _ in inspect.getmembers(layer)} - {key for key, _ in inspect.getmembers(nn.Module)}
        assert extra == {"can_torch_compile", "has_backward"}
        wanted = inspect.signature(Qwen3RMSNorm.forward).parameters
        kinds = [parameter.kind for parameter in inspect.signature(layer.forward).parameters.values()]
        assert kinds == [parameter.kind for parameter in wanted.values()]


def run(model: hf.PreTrainedModel, ids: Tensor) -> list[Tensor]:
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    return [output.logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("form", ["definitions", "mixed dtypes", "float64"])
def test_a_model_with_our_norms(
    form: str, mapping: dict[str, dict[str, hub_kernels.Layer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")
    model, ids = build(Case("qwen3", 4, 2, 16, tied=True, layers=2)), tokens(2, 5)
    if form == "float64":
        model.double()
    called = []
    original = hub_kernels.rms_norm
    monkeypatch.setattr(hub_kernels, "rms_norm", lambda *args: called.append(1) or original(*args))
    norms = [module for module in model.modules() if isinstance(module, Qwen3RMSNorm)]
    if form == "mixed dtypes":
        for norm in norms:
            norm.weight.data = norm.weight.data.double()
        x = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
        expected = norms[-1](x)
        norms[-1].forward = MethodType(mapping["RMSNorm"]["cpu"].load().forward, norms[-1])
        torch.testing.assert_close(norms[-1](x), expected, rtol=0, atol=1e-6)
        assert not called
        return
    expected = run(model, ids)
    for norm in norms:
        norm.forward = MethodType(mapping["RMSNorm"]["cpu"].load().forward, norm)
    for mine, theirs in zip(run(model, ids), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert len(called) == (0 if form == "float64" else len(norms))
    assert len(norms) == 9


@pytest.mark.parametrize("installed", [None, "0.1.0"])
def test_the_gate(installed: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_kernels_available", lambda: False)

    def version(name: str) -> str:
        if installed is None:
            raise hub_kernels.PackageNotFoundError
        return installed

    monkeypatch.setattr(hub_kernels, "version", version)
    says = "not installed" if installed is None else "kernels 0.1.0 is installed"
    with pytest.raises(TritiumError, match=rf"'kernels>=.*{says}"):
        tritium.kernel_mapping()
