"""Batches: functions of seed and step, over exactly the tokens of their documents."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tritium.runtime.errors import TritiumError
from tritium.runtime.training.config import Data, Evaluation, Fraction, TrainTokenizer
from tritium.runtime.training.data import Documents, Micro, batches, evaluation_batches, split_tokens
from tritium.runtime.training.sources import Source, Sources, read_sources
from tritium.runtime.training.vocabulary import END, Ids, merge_parts, train_bpe

OPENING, STOP = 90, 91
LENGTHS = (5, 1, 23, 8, 2, 11)


def numbered(lengths: tuple[int, ...] = LENGTHS) -> list[Ids]:
    """Documents whose tokens tell where they are: no id twice."""
    firsts = itertools.accumulate(lengths, initial=0)
    return [np.arange(first, first + length) for first, length in zip(firsts, lengths, strict=False)]


def source(documents: list[Ids], opening: int | None = OPENING, end: int | None = STOP) -> Source:
    between = [] if end is None else [np.array([end])]
    parts = [part for document in documents for part in (document, *between)][: -1 if between else None]
    bounds = None
    if end is None:
        lasts = np.cumsum([len(document) for document in documents])
        bounds = (np.column_stack([lasts - [len(document) for document in documents], lasts]),)
    return Source((np.concatenate(parts),), bounds, end, opening, None)


def settings(**changes: Any) -> Data:
    values: dict[str, Any] = {"train": ("x",), "sampling": "documents", "sequence_length": 8, "batch_tokens": 10}
    return Data(**{**values, **changes})


def same(a: list[Micro], b: list[Micro]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.labels, y.labels) and x.counts == y.counts
        for x, y in zip(a, b, strict=True)
    )


def pairs(micros: list[Micro]) -> list[tuple[int, int]]:
    return [pair for micro in micros for pair in zip(micro.tokens.tolist(), micro.labels.tolist(), strict=True)]


@pytest.mark.parametrize(("opening", "end"), [(OPENING, STOP), (None, STOP), (None, None)])
def test_an_epoch_has_every_token_once_with_its_successor(opening: int | None, end: int | None) -> None:
    """Whatever the pieces are cut into, each token's label is what follows it in its document."""
    documents = numbered()
    made = Documents(settings(accumulation=2), source(documents, opening, end), 100, 3, None)
    expected = Counter()
    for document in documents:
        ids = [*([] if opening is None else [opening]), *document.tolist(), -100 if end is None else end]
        expected.update(itertools.pairwise(ids))
    size = made.epoch(0).size
    assert size == expected.total() == sum(LENGTHS) + (len(LENGTHS) if opening is not None else 0)
    found = pairs([micro for step in range(size // 20 + 1) for micro in made.at(step)])
    assert Counter(found[:size]) == expected
    second = pairs([micro for step in range(size // 20, 2 * size // 20 + 1) for micro in made.at(step)])
    offset = size - size // 20 * 20
    assert Counter(second[offset : offset + size]) == expected
    assert second[offset : offset + size] != found[:size]


def test_pieces() -> None:
    """Full micro-batches, no sequence above the length, and none that holds tokens of two documents."""
    made = Documents(settings(accumulation=2), source(numbered()), 100, 3, None)
    owner = {token: index for index, document in enumerate(numbered()) for token in document.tolist()}
    for step in range(12):
        micros = made.at(step)
        assert len(micros) == 2
        for micro in micros:
            assert sum(micro.counts) == len(micro.tokens) == len(micro.labels) == 10
            assert max(micro.counts) <= 8
            for piece, labels in zip(micro.tokens.split(micro.counts), micro.labels.split(micro.counts), strict=True):
                assert OPENING not in piece[1:].tolist()
                assert len({owner[token] for token in piece.tolist() if token != OPENING}) <= 1
                assert piece[1:].tolist() == labels[:-1].tolist()
                assert STOP not in labels[:-1].tolist()
    assert any(micro.tokens[0] != OPENING for micro in made.at(0) + made.at(1) + made.at(2))


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    """Would break: a resumed run sees other data than the one that was not interrupted."""
    for data in (settings(), settings(sampling="windows", batch_tokens=None, batch_size=3, accumulation=2)):
        first, again = (batches(data, source(numbered()), None, 100, 5) for _ in range(2))
        forward = [first.at(step) for step in range(30)]
        assert same(again.at(29), forward[29])
        assert same(again.at(7), forward[7])
        assert same(first.at(3), forward[3])
        assert not same(forward[3], forward[4])
        assert not same(batches(data, source(numbered()), None, 100, 6).at(3), forward[3])


def test_windows() -> None:
    """Every place of every file is drawn alike, a label is the next token, and no window crosses from file to file."""
    arrays = (np.arange(30), np.arange(100, 106), np.arange(200, 212))
    made = batches(
        settings(sampling="windows", batch_tokens=None, batch_size=50, accumulation=2),
        Source(arrays, None, None, None, None),
        None,
        100,
        1,
    )
    starts: Counter[int] = Counter()
    for step in range(20):
        for micro in made.at(step):
            assert micro.counts == [8] * 50
            for window, labels in zip(micro.tokens.view(50, 8), micro.labels.view(50, 8), strict=True):
                first = int(window[0])
                assert window.tolist() == list(range(first, first + 8))
                assert labels.tolist() == list(range(first + 1, first + 9))
                starts[first] += 1
    assert set(starts) == {*range(22), *range(200, 204)}
    assert max(starts.values()) < 2 * 2000 / 26


def test_the_sequence_length_grows_by_schedule() -> None:
    lengths = ((0.0, 4), (0.5, 8))
    windows = batches(
        settings(sampling="windows", sequence_length=lengths, batch_tokens=16), source(numbered()), None, 10, 1
    )
    assert [windows.at(step)[0].counts for step in (0, 4, 5)] == [[4] * 4, [4] * 4, [8] * 2]
    documents = batches(settings(sequence_length=lengths), source(numbered()), None, 10, 1)
    assert max(max(documents.at(step)[0].counts) for step in range(5)) == 4
    assert max(max(documents.at(step)[0].counts) for step in range(5, 10)) == 8
    with pytest.raises(TritiumError, match="batch_tokens: must be a multiple of the sequence_length 4, got 10"):
        settings(sampling="windows", sequence_length=lengths)


def test_epochs_shorter_than_a_batch() -> None:
    made = Documents(settings(batch_tokens=50), source([np.array([1, 2])]), 10, 1, None)
    (micro,) = made.at(3)
    assert micro.tokens.tolist() == ([OPENING, 1, 2] * 17)[:50]  # the 150 tokens before are whole epochs


BOTTLES = [f"{number} green bottles hanging on the wall" for number in range(40)]


def read(tmp_path: Path, text: str | None = None, name: str = "text.txt", **changes: Any) -> Sources:
    path = tmp_path / name
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return read_sources(settings(**{"train": (str(path),), **changes}), 400, None)


def test_groups_of_pieces(tmp_path: Path) -> None:
    """Every epoch puts neighbouring pieces together anew; their text, separators included, is the whole text."""
    text = "\n\n".join(BOTTLES)
    data = settings(train=(str(write(tmp_path, text)),), document_separator="\n\n", group=4, tokenizer="characters")
    found = read_sources(data, 400, None)
    made = batches(data, found.train, found.vocabulary, 100, 2)
    assert isinstance(made, Documents)
    assert found.vocabulary is not None
    tokenizer = found.vocabulary.tokenizer
    counts = []
    for number in range(3):
        epoch = made.epoch(number)
        documents = [tokenizer.decode(epoch.arrays[0][first:last].tolist()) for _, first, last in epoch.documents]
        counts.append(len(documents))
        assert "".join(sorted(documents, key=lambda part: int(part.split()[0]))) == text + "\n\n"
        assert documents != sorted(documents, key=lambda part: int(part.split()[0]))
    assert len(set(counts)) > 1
    assert 5 < np.mean(counts) < 20


def write(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text(text, encoding="utf-8")
    return folder / "text.txt"


def test_merge_dropout_spells_the_same_text_otherwise() -> None:
    vocabulary = train_bpe(BOTTLES, 330)
    parts = merge_parts(vocabulary.tokenizer)
    ids = np.array(vocabulary.tokenizer.encode(" ".join(BOTTLES)))
    owners = np.arange(len(ids)) // 7
    spelt, theirs = split_tokens(ids, owners, parts, 0.3, np.random.default_rng(1))
    assert vocabulary.tokenizer.decode(spelt.tolist()) == " ".join(BOTTLES)
    assert len(spelt) > len(ids)
    for owner in (0, 5, owners[-1]):
        here, before = spelt[theirs == owner].tolist(), ids[owners == owner].tolist()
        assert vocabulary.tokenizer.decode(here) == vocabulary.tokenizer.decode(before)
    assert np.array_equal(split_tokens(ids, owners, parts, 0.0, np.random.default_rng(1))[0], ids)
    letters, _ = split_tokens(ids, owners, parts, 0.999999, np.random.default_rng(1))
    assert max(len(vocabulary.tokenizer.decode([token])) for token in letters.tolist()) == 1


def test_merge_dropout_needs_merges(tmp_path: Path) -> None:
    found = read(tmp_path, "abc\n", tokenizer="characters")
    with pytest.raises(TritiumError, match="data: merge_dropout: the tokenizer has no merges"):
        batches(settings(merge_dropout=0.1), found.train, found.vocabulary, 10, 1)
    for changes, name in (
        ({"merge_dropout": 0.1}, "merge_dropout"),
        ({"group": 2, "document_separator": "x"}, "group"),
    ):
        with pytest.raises(TritiumError, match=f"data: {name}: is for texts, and the data are token files"):
            batches(settings(**changes), source(numbered()), None, 10, 1)


# Sources


def test_text_is_split_by_characters(tmp_path: Path) -> None:
    """As nanoGPT splits; what is held out is in neither part."""
    text = "".join(chr(97 + index % 26) for index in range(997))
    path = write(tmp_path, text)
    for held_out, cuts in ((0.0, (897, 997)), (0.2, (717, 797))):
        data = settings(
            train=(str(path),), validation=Fraction(fraction=0.1), held_out=held_out, tokenizer="characters"
        )
        found = read_sources(data, 400, None)
        assert found.vocabulary is not None
        assert found.validation is not None
        parts = [found.vocabulary.tokenizer.decode(part.arrays[0].tolist()) for part in (found.train, found.validation)]
        assert parts == [text[: cuts[0]], text[cuts[0] : cuts[1]]]
        assert found.validation.nbytes == cuts[1] - cuts[0]


def test_documents_of_texts(tmp_path: Path) -> None:
    """Lines of .jsonl and pieces between separators are documents, with the end of text between them."""
    lines = "\n".join(json.dumps({"text": text}) for text in BOTTLES)
    tokenizer = TrainTokenizer(vocab_size=300)
    for name, text, separator in (("a.jsonl", lines, None), ("a.txt", "|".join(BOTTLES), "|")):
        found = read(tmp_path, text, name, tokenizer=tokenizer, document_separator=separator)
        assert found.vocabulary is not None
        (array,) = found.train.arrays
        decode = found.vocabulary.tokenizer.decode
        assert [decode(array[first:last].tolist()) for _, first, last in found.train.documents] == BOTTLES
        assert (found.train.opening, found.train.end) == (0, 0)
        assert decode(array.tolist(), skip_special_tokens=False) == END.join(BOTTLES)


def test_documents_of_token_files(tmp_path: Path) -> None:
    """.npy and .bin are mapped, not read; documents lie between the ends, and empty ones are none."""
    ids = np.array([5, 6, 7, 3, 3, 8, 9, 3, 1], dtype=np.uint16)
    np.save(tmp_path / "ids.npy", ids)
    ids.tofile(tmp_path / "ids.bin")
    for name in ("ids.npy", "ids.bin"):
        found = read(tmp_path, name=name, dtype="uint16", eos_id=3)
        assert isinstance(found.train.arrays[0], np.memmap)
        assert found.train.documents.tolist() == [[0, 0, 3], [0, 5, 7], [0, 8, 9]]
        assert (found.train.opening, found.train.end, found.vocabulary) == (3, 3, None)
    without = read(tmp_path, name="ids.npy")
    assert without.train.documents.tolist() == [[0, 0, 9]]
    (tmp_path / "odd.bin").write_bytes(b"\x01\x00\x02")
    with pytest.raises(TritiumError, match=r"odd\.bin: not a file of token ids"):
        read(tmp_path, name="odd.bin", dtype="uint16")


def test_the_fingerprint_sees_every_token_and_boundary() -> None:
    whole = source(numbered(), None, None)
    same_again = source(numbered(), None, None)
    assert whole.fingerprint() == same_again.fingerprint()
    other = source([array.copy() for array in numbered()], None, None)
    other.arrays[0][-1] += 1
    moved = source(numbered((6, *LENGTHS[1:])), None, None)
    assert len({whole.fingerprint(), other.fingerprint(), moved.fingerprint()}) == 3


def test_evaluation_scores_every_token_once() -> None:
    """In any window, stride and limit; over documents each with its opening, and none across a boundary."""
    documents = numbered()
    everything = [token for document in documents for token in document.tolist()]
    for window, stride, size in ((8, None, 10), (8, 4, 16), (5, 1, 7), (64, 3, 64)):
        found = list(evaluation_batches(source(documents), settings(), Evaluation(window=window, stride=stride), size))
        labels = [label for micro in found for label in micro.labels.tolist() if label != -100]
        assert labels == everything
        for micro in found:
            assert sum(micro.counts) == len(micro.tokens) == len(micro.labels)
            for piece, label in zip(micro.tokens.split(micro.counts), micro.labels.split(micro.counts), strict=True):
                assert len(piece) <= window
                assert OPENING not in piece[1:].tolist()
                kept = label[label != -100]
                assert piece[1:].tolist()[-len(kept) + 1 :] == kept[:-1].tolist() or len(kept) == 1
    limited = list(evaluation_batches(source(documents), settings(), Evaluation(tokens=17), 16))
    assert [label for micro in limited for label in micro.labels.tolist() if label != -100] == everything[:17]
    windows = settings(sampling="windows", batch_tokens=None, batch_size=2)
    flat = source(documents)
    found = list(evaluation_batches(flat, windows, Evaluation(), 16))
    assert [label for micro in found for label in micro.labels.tolist()] == flat.arrays[0][1:].tolist()
    assert max(sum(micro.counts) for micro in found) == 16


def test_a_tokenizer_does_not_see_what_is_held_out(tmp_path: Path) -> None:
    text = "abab " * 100 + "zqzq " * 100
    found = [read(tmp_path, text, tokenizer=TrainTokenizer(vocab_size=260), held_out=part) for part in (0.0, 0.5)]
    seen = [sources.vocabulary.tokenizer.fast.token_to_id("zq") for sources in found if sources.vocabulary]
    assert seen[0] is not None
    assert seen[1] is None
