"""Gradients of whole models against those of `transformers` on the same weights, by both paths."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from tritium.runtime.batch import Batch
from tritium.runtime.decoder import Decoder
from tritium.runtime.layers import KEPT
from tritium.runtime.registry import get_family
from tritium.runtime.weight_map import WeightMap

import tritium
from tests import oracle

from ..rule import DEVICE, same_bits

LENGTHS = (9, 4, 1, 13)
# All on a GPU; in the interpreter each kind of each family once, two layers of it and one row.
KINDS = {(case.family, case.what): case for case in reversed(oracle.CASES)}
ON_KERNELS = oracle.CASES if DEVICE == "cuda" else list(KINDS.values())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[oracle.Case], tuple[PreTrainedModel, Decoder]]:
    made: dict[oracle.Case, tuple[PreTrainedModel, Decoder]] = {}

    def get(case: oracle.Case) -> tuple[PreTrainedModel, Decoder]:
        if case not in made:
            theirs = oracle.build(case)
            folder: Path = oracle.save(case, theirs, tmp_path_factory.mktemp("checkpoint") / str(case))
            ours = tritium.load(folder, device=DEVICE, dtype="float32", backend="torch", progress=False)[0]
            made[case] = (theirs.to(DEVICE), ours)
        return made[case]

    return get


def rows_of(lengths: tuple[int, ...]) -> list[Tensor]:
    return [oracle.tokens(1, length, seed=length)[0].to(DEVICE) for length in lengths]


def expected_of(case: oracle.Case, model: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean loss over all rows' tokens, each row alone, and its gradient by every tensor, in the file's layout."""
    model.zero_grad()
    total = torch.zeros((), device=DEVICE)
    for row in rows:
        if len(row) > 1:
            logits = model(row[None]).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum")
    loss = total / sum(len(row) - 1 for row in rows)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.detach(), oracle.own_layout(case, gradients)


def compare(case: oracle.Case, model: Decoder, expected: Mapping[str, Tensor]) -> None:
    ours = dict(model.named_parameters())
    pieces = WeightMap(get_family(case.family), model.config, ours.items()).pieces
    assert set(pieces) == set(expected)
    for name, piece in pieces.items():
        found = piece.read(ours[piece.parameter].grad)
        allowed = 1e-5 * expected[name].abs().max().item()
        torch.testing.assert_close(
            found, expected[name], atol=allowed, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    x, mask = torch.full((2, len(rows), width), 7, device=DEVICE)
    mask.zero_()
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        x[index, place], mask[index, place] = row, 1
    return x, mask


def packed_loss(model: Decoder, rows: list[Tensor]) -> Tensor:
    tokens = torch.cat(rows)
    labels = torch.cat([torch.cat((row[1:], row.new_full((1,), -100))) for row in rows])
    return model.loss(tokens, labels, Batch.fresh([len(row) for row in rows], tokens.device))


def losses(model: Decoder, rows: list[Tensor]) -> dict[str, Callable[[], Tensor | None]]:
    """Every way to the same loss."""
    ways: dict[str, Callable[[], Tensor | None]] = {"packed": lambda: packed_loss(model, rows)}
    for side in ("left", "right"):
        x, mask = padded(rows, side)
        ways[side] = lambda x=x, mask=mask: model(x, mask, x).loss
        ways[f"{side}, no logits"] = lambda x=x, mask=mask: model(x, mask, x, return_logits=False).loss
    return ways


@pytest.mark.parametrize("case", oracle.CASES, ids=str)
def test_gradients_of_the_pytorch_path(
    case: oracle.Case, models: Callable[[oracle.Case], tuple[PreTrainedModel, Decoder]]
) -> None:
    """By every tensor, padded and packed, with and without checkpointing."""
    theirs, ours = models(case)
    rows = rows_of(LENGTHS)
    loss, expected = expected_of(case, theirs, rows)
    for way, run in losses(ours, rows).items():
        for keep in (None, *KEPT) if way == "packed" else (None, "nothing"):
            ours.enable_gradient_checkpointing(keep is not None, keep or "nothing")
            ours.zero_grad()
            found = run()
            found.backward()
            torch.testing.assert_close(found.detach(), loss, atol=1e-5, rtol=1e-5)
            compare(case, ours, expected)
    ours.enable_gradient_checkpointing(False)


@pytest.mark.parametrize("case", ON_KERNELS, ids=str)
def test_gradients_of_the_triton_path(
    case: oracle.Case, models: Callable[[oracle.Case], tuple[PreTrainedModel, Decoder]]
) -> None:
    """The same by the kernels; a second time, recomputing, gives the same bits."""
    theirs, ours = models(case)
    rows = rows_of(LENGTHS if DEVICE == "cuda" else (5, 3))
    loss, expected = expected_of(case, theirs, rows)
    ours.use_backend("triton")
    found = []
    try:
        for keep in (None, "attention"):
            ours.enable_gradient_checkpointing(keep is not None, keep or "nothing")
            ours.zero_grad()
            mine = packed_loss(ours, rows)
            mine.backward()
            torch.testing.assert_close(mine.detach(), loss, atol=1e-5, rtol=1e-5)
            compare(case, ours, expected)
            found.append([parameter.grad.clone() for parameter in ours.parameters()])
    finally:
        ours.enable_gradient_checkpointing(False)
        ours.use_backend("torch")
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))
