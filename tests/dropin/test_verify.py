"""`tritium verify --transformers`: right models pass, a wrong path is named, and one line for a mistake."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime import cli
from tritium.runtime.dropin import attention, conversion, verify
from tritium.runtime.errors import TritiumError

from ..oracle import Case, build, save

CASES = [
    Case("qwen3", 4, 2, 16, tied=True, layers=2),
    Case("gpt", 4, 4, 12, tied=True, layers=2),
    Case("mobilellm", 4, 2, 16, tied=True, layers=2),
    Case("qwen3_moe", 4, 2, 16, tied=False, layers=2),
]
PROMPT = [3, 1, 4, 15, 9, 26, 5, 35]


@pytest.fixture(autouse=True)
def definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritium.kernels.launch.obstacle", lambda *args: "not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(CASES[0], build(CASES[0]), tmp_path_factory.mktemp("verify") / "first")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_models_pass(case: Case, tmp_path: Path) -> None:
    source = str(save(case, build(case), tmp_path / "checkpoint"))
    report = verify.verify(source, PROMPT, 4, "cpu")
    assert report.problems == []
    assert [way.name for way in report.ways] == ["eager", "accelerated", "our decoder"]
    for way in report.ways:
        assert way.tokens == report.ways[0].tokens
        assert [len(row) for row in way.tokens] == [4, 4]
        assert 0 < way.logits.rms < 1e-5
        assert way.loss == pytest.approx(report.ways[0].loss, abs=1e-5)
    assert "accelerated: " in report.accelerated


def test_bfloat16_is_measured_by_eagers_own_error(folder: Path) -> None:
    report = verify.verify(str(folder), PROMPT, 2, "cpu", "bfloat16")
    assert report.problems == []
    assert report.ways[0].logits.rms > 1e-3


@pytest.mark.parametrize("what", ["logits", "padding", "decoder"])
def test_a_wrong_path_is_named(what: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is off; padding that is not left out, which only the padded row's tokens can tell; a decoder's
    weight."""
    original = attention.attention_forward

    def wrong(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if what == "logits":
            kwargs["scaling"] *= 1.01
        elif what == "padding":
            shown = torch.zeros_like(mask)
            shown[..., 1] = mask.sum(-1)
            mask = shown
        return original(module, q, k, v, mask, **kwargs)

    if what == "decoder":
        made = conversion.from_transformers

        def spoilt(model: Any) -> Any:
            decoder = made(model)
            with torch.no_grad():
                decoder.embedding.weight[4] += 0.01
            return decoder

        monkeypatch.setattr(verify, "from_transformers", spoilt)
    else:
        monkeypatch.setattr("tritium.runtime.dropin.registration.attention_forward", wrong)
    report = verify.verify(str(folder), PROMPT, 6, "cpu")
    named = {problem.partition(":")[0] for problem in report.problems}
    assert named == {"our decoder" if what == "decoder" else "accelerated"}
    assert any("logits" in problem for problem in report.problems) == (what != "padding")
    if what == "padding":
        assert all("greedy" in problem and "row 1" in problem for problem in report.problems)


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit codes, and the table; the checkpoint has no tokenizer."""
    command = ["verify", "--transformers", str(folder), "--device", "cpu", "--max-new-tokens", "3"]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "our decoder" in out
    assert out.count("6 (the same)") == 2
    assert out.endswith("Accelerated, and as our decoder, it is right.\n")
    monkeypatch.setattr(verify, "WHOLE_PATH", 1e-9)
    monkeypatch.setattr(verify, "WHOLE_FREE", 1e-12)
    assert cli.main(command) == 1
    assert "wrong: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--checkpoint", "x"], "--checkpoint: not with --transformers"),
        (["--plot", "x.png"], "--plot"),
        (["--dtype", "float65"], "float65"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be 1 or more"),
    ],
)
def test_mistakes(arguments: list[str], says: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--transformers", str(folder), "--device", "cpu", *arguments]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.strip().splitlines()) == 1


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(TritiumError, match=f"{tmp_path}: transformers cannot load it"):
        verify.verify(str(tmp_path), PROMPT, 2, "cpu")
    with pytest.raises(TritiumError, match="3 tokens or more"):
        verify.verify(str(tmp_path), [1, 2], 2, "cpu")
