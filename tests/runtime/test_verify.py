"""`tritium verify`: right models pass, and each disturbed kernel is named with its layer."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tritium.runtime import backend, cli, verify
from tritium.runtime.accuracy import Errors, broken, errors
from tritium.runtime.operations import KERNELS, Operations
from tritium.runtime.triton_path import Modes, compose

import tritium
from tests import oracle
from tests.rule import DEVICE

CASES = [
    oracle.Case("qwen3", 4, 2, 16, tied=True, layers=2),
    oracle.Case("mobilellm", 4, 1, 56, tied=False, layers=2),
    oracle.Case("qwen3_moe", 4, 2, 16, tied=True, layers=2),
    oracle.Case("gpt", 4, 4, 12, tied=True, layers=2),
]
OPERATIONS = [entry.name for entry in dataclasses.fields(Operations)]
EXPERTS = {"route", "group", "grouped_swiglu", "grouped_linear", "combine"}
ABSENT = {  # what a family's models do not run
    "qwen3": EXPERTS | {"layer_norm", "quantised_linear"},
    "mobilellm": EXPERTS | {"layer_norm", "quantised_linear"},
    "qwen3_moe": {"quantised_linear", "layer_norm", "linear_swiglu", "swiglu", "norm_linear_swiglu"},
    "gpt": EXPERTS
    | {"rms_norm", "linear_swiglu", "swiglu", "norm_linear", "norm_linear_swiglu", "norm_head", "quantised_linear"},
}


def case_with(operation: str) -> oracle.Case:
    """The first whose model runs the operation; where weights have fewer bits, the first."""
    return next((case for case in CASES if operation not in ABSENT[case.family]), CASES[0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oracle.save(CASES[0], oracle.build(CASES[0]), tmp_path_factory.mktemp("verify") / "first")


def model_of(checkpoint: Path, dtype: str = "float32", quantise: str | None = None) -> tritium.Decoder:
    return tritium.load(checkpoint, device=DEVICE, dtype=dtype, quantise=quantise, progress=False)[0]


@pytest.mark.parametrize(("case", "dtype"), [(CASES[0], "float32"), *((case, "bfloat16") for case in CASES)], ids=str)
def test_passes_on_right_kernels(case: oracle.Case, dtype: str, tmp_path: Path) -> None:
    """Every operation of every layer is in the report, none of them idle."""
    family = case.family
    model = model_of(oracle.save(case, oracle.build(case), tmp_path / "checkpoint"), dtype)
    before = model.backend
    report = verify.verify(model, oracle.tokens(1, 9)[0].tolist(), 4)
    assert report.problems == []
    assert model.backend is before
    named = {row.operation.partition(" ")[0] for row in report.rows}
    assert named == set(OPERATIONS) - ABSENT[family]
    assert {row.layer for row in report.rows} == {None, 0, 1}
    assert len(report.depth) == 2
    assert max(report.divergence.values()) < (1e-9 if dtype == "float32" else 1e-2)
    assert all(row.torch.largest > 0 for row in report.rows if row.operation in ("linear", "attention", "rms_norm"))
    assert "4 greedy tokens" in report.greedy or dtype == "bfloat16"


def disturbed(name: str, calls: list[int], at: int) -> Any:
    """The kernel, wrong in its call number `at`: one element in a hundred, by a part in a hundred."""
    kernel = getattr(KERNELS, name)

    def spoil(x: Tensor) -> Tensor:
        if x.dtype == torch.int64:
            return (x + 1) % oracle.VOCAB
        if x.dtype == torch.int32:  # experts, or an order of assignments: others, but none that is not there
            return x.roll(1, 0)
        x.view(-1)[:: max(1, x.numel() // 100)] *= 1.01
        return x

    def run(*args: Any) -> Any:
        result = kernel(*args)
        calls.append(len(calls))
        if len(calls) - 1 != at:
            return result
        return (spoil(result[0]), *result[1:]) if isinstance(result, tuple) else spoil(result)

    return run


@pytest.mark.parametrize("name", OPERATIONS)
def test_names_the_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Each kernel, disturbed in one call only, is named, and in its layer; nothing else is."""
    case = case_with(name)
    quantise = "int8" if name == "quantised_linear" else None
    model = model_of(oracle.save(case, oracle.build(case), tmp_path / "checkpoint"), quantise=quantise)
    tokens = oracle.tokens(1, 9)[0].tolist()
    calls: list[int] = []
    twice = ("rms_norm", "layer_norm", "linear_residual", "decode_linear_residual")
    per_layer = 4 if quantise else 2 if name in twice else 1
    outside = name in ("sample", "cross_entropy", "linear_cross_entropy", "norm_head")
    spoiled = disturbed(name, calls, 0 if outside else per_layer)  # the first call of the second layer
    monkeypatch.setattr(verify, "KERNELS", dataclasses.replace(KERNELS, **{name: spoiled}))
    report = verify.verify(model, tokens, 2)
    first = "outside the layers" if outside else "layer 1"
    assert report.problems
    assert all(problem.startswith(f"{first}, {name}") for problem in report.problems)
    wrong = [row for row in report.rows if row.wrong]
    assert {row.operation.partition(" ")[0] for row in wrong} == {name}
    assert {row.layer for row in wrong} == {None if outside else 1}
    assert "WRONG" in verify.table(report)


def test_a_wrong_cache_write_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Writing one slot further spoils no result of the call itself: only the cache shows it."""
    case = CASES[0]
    model = model_of(oracle.save(case, oracle.build(case), tmp_path / "checkpoint"))

    def shifted(*args: Any) -> Tensor:
        return KERNELS.qk_norm_rope_cache(*args[:-1], args[-1] + 1)

    monkeypatch.setattr(verify, "KERNELS", dataclasses.replace(KERNELS, qk_norm_rope_cache=shifted))
    report = verify.verify(model, oracle.tokens(1, 9)[0].tolist(), 1)
    wrong = {row.operation for row in report.rows if row.wrong}
    assert wrong == {"qk_norm_rope_cache k", "qk_norm_rope_cache v"}


def test_a_kernel_that_gives_no_numbers_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its NaN ends generation: the report must come all the same, with the kernel in it."""
    case = CASES[0]
    model = model_of(oracle.save(case, oracle.build(case), tmp_path / "checkpoint"))
    broken_set = dataclasses.replace(KERNELS, linear_swiglu=lambda *args: KERNELS.linear_swiglu(*args) * float("nan"))
    monkeypatch.setattr(verify, "KERNELS", broken_set)
    wrong = compose("triton", broken_set, Modes())
    for module in (backend, verify):
        monkeypatch.setattr(module, "triton_kernels", lambda modes: wrong)
    report = verify.verify(model, oracle.tokens(1, 9)[0].tolist(), 2)
    assert report.problems[0].startswith("layer 0, linear_swiglu: largest error inf")
    assert any("cannot continue the prompt: the logits are not numbers" in problem for problem in report.problems)


def test_whole_paths_are_compared_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path that is wrong only as a whole: its logits and its tokens tell."""
    case = CASES[0]
    model = model_of(oracle.save(case, oracle.build(case), tmp_path / "checkpoint"))
    right = backend.triton_kernels(model.backend.modes)

    def negated(*args: Any) -> tuple[Tensor, Tensor]:
        hidden, logits = right.norm_head(*args)
        return hidden, -logits

    wrong = dataclasses.replace(right, norm_head=negated)
    for module in (backend, verify):
        monkeypatch.setattr(module, "triton_kernels", lambda modes: wrong)
    report = verify.verify(model, oracle.tokens(1, 9)[0].tolist(), 2)
    assert any(problem.startswith("logits: rms error") for problem in report.problems)
    assert any(problem.startswith("greedy token 0 differs") for problem in report.problems)
    assert report.divergence["triton from truth"] > 1


def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 0 and a plot where it is right, 1 where it is not."""
    checkpoint = oracle.save(CASES[1], oracle.build(CASES[1]), tmp_path / "checkpoint")
    arguments = ["verify", "--checkpoint", str(checkpoint), "--device", DEVICE, "--max-new-tokens", "2"]
    monkeypatch.setattr(cli, "VERIFY_IDS", 6)
    picture = tmp_path / "depth.png"
    assert cli.main([*arguments, "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "The Triton path is right." in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    spoiled = dataclasses.replace(KERNELS, linear=lambda *args: KERNELS.linear(*args) * 1.01)
    monkeypatch.setattr(verify, "KERNELS", spoiled)
    assert cli.main(arguments) == 1
    assert "layer 0, linear: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--backend", "torch"], "--backend torch: verify compares both paths; leave --backend out"),
        (["--max-new-tokens", "0"], "--max-new-tokens: must be 1 or more, got 0"),
        (["--plot", "/nowhere/depth.png"], "--plot: /nowhere/depth.png: give a .png file in a folder that exists"),
        (["--plot", "depth.pdf"], "--plot: depth.pdf: give a .png file"),
        (["--plot", "."], "--plot: .: give a .png file"),
        ([], "verify cannot run here: it needs a GPU that Triton drives, and torch sees none; with TRITON_INTERPRET=1"),
    ],
    ids=lambda part: " ".join(part)[:30] if isinstance(part, list) else "",
)
def test_mistakes_are_said_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("tritium.kernels.launch.INTERPRETED", False)
    monkeypatch.setattr(cli, "_load", lambda options: pytest.fail("loaded"))
    assert cli.main(["verify", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_the_distance_of_a_draw() -> None:
    """What of a drawn token is wrong: how far its number lies outside its interval, or that it may not be drawn."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().expand(5, 3)
    uniform, tokens = torch.tensor([0.1, 0.6, 0.9, 0.1, 0.9]), torch.tensor([0, 1, 2, 1, 0])
    never = float("inf")
    for top_k, top_p, expected in (
        (0, 1.0, [0, 0, 0, 0.4, 0.4]),
        (2, 1.0, [0, 0.025, never, 0.525, 0.275]),
        (0, 0.4, [0, never, never, never, 0]),
    ):
        got = verify._distance(logits, 1.0, top_k, top_p, uniform, tokens)
        assert got.tolist() == pytest.approx(expected, abs=1e-6), (top_k, top_p)
    nowhere = torch.tensor([-1, 3, 0, 0, 0])
    assert verify._distance(logits, 1.0, 0, 1.0, uniform, nowhere).tolist()[:2] == [never, never]


def test_the_rule() -> None:
    """Where a kernel may be worse than its definition, and by how much."""
    truth = torch.tensor([1.0, 2.0, float("inf")], dtype=torch.float64)
    assert errors(torch.tensor([1.0, 2.5, float("inf")]), truth) == pytest.approx(Errors(0.5, (0.25 / 3) ** 0.5))
    assert errors(torch.tensor([float("nan"), 2.0, float("inf")]), truth).largest == float("inf")
    assert errors(torch.tensor([float("inf"), 2.0, float("inf")]), truth).largest == float("inf")
    assert broken(Errors(0.19, 0.11), Errors(0.1, 0.1), truth) is None
    assert broken(Errors(0.21, 0.1), Errors(0.1, 0.1), truth).startswith("largest error 0.21")
    assert broken(Errors(0.1, 0.13), Errors(0.1, 0.1), truth).startswith("rms error 0.13")
    assert broken(Errors(float("nan"), 0.1), Errors(0.1, 0.1), truth) is not None
    assert broken(Errors(4e-7, 4e-7), Errors(0.0, 0.0), truth) is None  # float32's own resolution at 2
