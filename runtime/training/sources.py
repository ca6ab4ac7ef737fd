"""Token ids from texts and from token files, split into what is trained on and what is measured."""

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import TritiumError
from ..files import read_text
from .config import Data, Fraction, TrainTokenizer, find
from .vocabulary import Ids, Vocabulary, characters, of_folder, train_bpe

CHUNK = 1 << 24  # tokens that are looked at together
TOKEN_FILES = (".npy", ".bin")


@dataclass(frozen=True)
class Source:
    """The tokens of one split: an array a file, whose documents have `end` between them where there is such an id."""

    arrays: tuple[Ids, ...]
    bounds: tuple[Ids, ...] | None  # [documents, 2] of each array; None: between the ends
    end: int | None
    opening: int | None
    nbytes: int | None  # of the text; None where it is not known

    @cached_property
    def documents(self) -> Ids:
        """[documents, 3] int64: array, first token, one behind the last. Empty ones are left out."""
        found = []
        for index, array in enumerate(self.arrays):
            bounds = _between(array, self.end) if self.bounds is None else self.bounds[index]
            bounds = bounds[bounds[:, 1] > bounds[:, 0]]
            found.append(np.column_stack([np.full(len(bounds), index), bounds]))
        return np.concatenate(found)

    @property
    def size(self) -> int:
        return sum(map(len, self.arrays))

    def fingerprint(self) -> int:
        """A checksum of all tokens and boundaries: two runs over the same data have the same."""
        checksum = 0
        for array in (*self.arrays, *(self.bounds or ())):
            for start in range(0, len(array), CHUNK):
                checksum = zlib.crc32(array[start : start + CHUNK].tobytes(), checksum)
        return checksum


@dataclass(frozen=True)
class Sources:
    """What a run reads."""

    train: Source
    validation: Source | None
    vocabulary: Vocabulary | None  # None: token files, of a model without a tokenizer


def read_sources(data: Data, vocab_size: int, own: Vocabulary | None) -> Sources:
    """Reads, encodes and checks everything. `own` is the tokenizer of the model's checkpoint.

    Raises TritiumError, naming the file, for one that is missing, empty, malformed or not of the model's vocabulary.
    """
    named = data.validation if isinstance(data.validation, tuple) else ()
    paths = [_existing(name) for name in (*data.train, *named)]
    texts = {path: _read_documents(path, data) for path in paths if path.suffix not in TOKEN_FILES}
    vocabulary = _vocabulary(data, [text for documents in texts.values() for text in documents], own)
    if texts and vocabulary is None:
        raise TritiumError(
            "data: tokenizer: this model has none of its own: give characters, a folder, or one to train"
        )
    end = data.eos_id if data.eos_id is not None or vocabulary is None else vocabulary.end
    opening = end if data.eos_id is not None or vocabulary is None else vocabulary.opening
    split = data.validation.fraction if isinstance(data.validation, Fraction) else 0.0
    reader = _Reader(data, texts, vocabulary, vocab_size, end, opening)
    parts = [reader.split(path, split) for path in paths[: len(data.train)]]
    train = reader.source([part for part, _ in parts], whole=False)
    validation = None
    if data.validation is not None:
        measured = [reader.split(path, 0.0)[0] for path in paths[len(data.train) :]] or [rest for _, rest in parts]
        validation = reader.source(measured, whole=True)
    return Sources(train, validation, vocabulary)


@dataclass(frozen=True)
class _Part:
    """A part of one file: documents of text, or tokens."""

    path: Path
    content: list[str] | Ids


@dataclass(frozen=True)
class _Reader:
    data: Data
    texts: dict[Path, list[str]]
    vocabulary: Vocabulary | None
    vocab_size: int
    end: int | None
    opening: int | None

    def split(self, path: Path, fraction: float) -> tuple[_Part, _Part]:
        """What comes before the last part of a file, and that part; what is held out is in neither."""

        def cut(size: int) -> tuple[int, int]:
            kept = _kept(size, self.data.held_out)
            return _kept(kept, fraction), kept

        content: list[str] | Ids
        if path in self.texts:
            content = self.texts[path]
            if path.suffix != ".jsonl":  # one text, cut between characters
                first, kept = cut(len(content[0]))
                return _Part(path, [content[0][:first]]), _Part(path, [content[0][first:kept]])
        else:
            content = _read_tokens(path, self.data.dtype, self.vocab_size)
        first, kept = cut(len(content))
        return _Part(path, content[:first]), _Part(path, content[first:kept])

    def source(self, parts: Sequence[_Part], whole: bool) -> Source:
        """The parts of one split. `whole` text is read as it stands, and not in the pieces that `group` regroups."""
        arrays, bounds, nbytes = [], [], 0
        for part in parts:
            if not isinstance(part.content, list):
                arrays.append(part.content)
                continue
            documents = part.content
            nbytes += sum(len(text.encode()) for text in documents)
            separator = self.data.document_separator
            if separator is not None and part.path.suffix != ".jsonl" and not (whole and self.data.group is not None):
                documents = _pieces(documents[0], separator, keep=self.data.group is not None)
            array, bound = self._encode(part.path, documents)
            arrays.append(array)
            bounds.append(bound)
        if bounds and len(bounds) < len(arrays):
            raise TritiumError("data: give either texts or token files, not both in one list")
        return Source(tuple(arrays), tuple(bounds) or None, self.end, self.opening, nbytes if bounds else None)

    def _encode(self, path: Path, documents: Sequence[str]) -> tuple[Ids, Ids]:
        """(tokens with the end between documents, the documents' bounds [D, 2])."""
        assert self.vocabulary is not None
        between = [] if self.end is None or self.data.group is not None else [self.end]
        pieces: list[Ids] = []
        bounds = np.zeros((len(documents), 2), dtype=np.int64)
        at = 0
        for index, text in enumerate(documents):
            ids = np.asarray(self.vocabulary.tokenizer.encode(text, add_special_tokens=False), dtype=np.int32)
            if index and between:
                pieces.append(np.asarray(between, dtype=np.int32))
                at += 1
            pieces.append(ids)
            bounds[index] = at, at + len(ids)
            at += len(ids)
        array = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
        _check_ids(array, path, self.vocab_size)
        return array, bounds


def _kept(size: int, fraction: float) -> int:
    """How much is left where a part is split off."""
    return int(size * (1 - fraction))


def _existing(name: str) -> Path:
    path = find(name)
    if not path.is_file():
        raise TritiumError(f"{path}: no such data file")
    return path


def _read_documents(path: Path, data: Data) -> list[str]:
    """The documents of a .jsonl file, or the one text of any other."""
    text = read_text(path)
    if not text.strip():
        raise TritiumError(f"{path}: the data file is empty")
    if path.suffix != ".jsonl":
        return [text]
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise TritiumError(f'{path}: line {number} must be a JSON object with "text"')
        documents.append(document["text"])
    return documents


def _read_tokens(path: Path, dtype: str | None, vocab_size: int) -> Ids:
    """The ids of a .npy or .bin file, mapped into memory, all of them checked."""
    if path.suffix == ".bin" and dtype is None:
        raise TritiumError(f"{path}: of which type are its ids? give data: dtype: uint16 or uint32")
    if path.stat().st_size == 0:
        raise TritiumError(f"{path}: the data file is empty")
    try:
        ids: Ids = np.load(path, "r", False) if path.suffix == ".npy" else np.memmap(path, np.dtype(dtype), "r")
    except (ValueError, EOFError, OSError) as error:
        raise TritiumError(f"{path}: not a file of token ids ({error})") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise TritiumError(f"{path}: must hold whole numbers in one row, got {ids.dtype} {list(ids.shape)}")
    if not len(ids):
        raise TritiumError(f"{path}: the data file is empty")
    _check_ids(ids, path, vocab_size)
    return ids


def _check_ids(ids: Ids, path: Path, vocab_size: int) -> None:
    """Raises TritiumError for the first id that the model has no row for."""
    for start in range(0, len(ids), CHUNK):
        part = ids[start : start + CHUNK]
        if int(part.min()) < 0 or int(part.max()) >= vocab_size:
            wrong = int(np.flatnonzero((part < 0) | (part >= vocab_size))[0])
            raise TritiumError(
                f"{path}: token {start + wrong} has the id {int(part[wrong])}, outside the model's vocabulary of 0 to "
                f"{vocab_size - 1}"
            )


def _between(array: Ids, end: int | None) -> Ids:
    """[D, 2]: the stretches between the ends."""
    found: Iterator[Ids] = (
        start + np.flatnonzero(array[start : start + CHUNK] == end) for start in range(0, len(array), CHUNK)
    )
    ends = np.concatenate(list(found)) if end is not None else np.zeros(0, dtype=np.int64)
    return np.column_stack([np.concatenate([[0], ends + 1]), np.concatenate([ends, [len(array)]])])


def _pieces(text: str, separator: str, keep: bool) -> list[str]:
    """The text between separators, each piece with the separator behind it where they are to be kept."""
    pieces = [piece for piece in text.split(separator) if piece]
    return [piece + separator for piece in pieces] if keep else pieces


def _vocabulary(data: Data, texts: Sequence[str], own: Vocabulary | None) -> Vocabulary | None:
    if isinstance(data.tokenizer, TrainTokenizer):
        if not texts:
            raise TritiumError("data: tokenizer: is trained on text, and the data are token files")
        looked_at = (text[: _kept(len(text), data.held_out)] for text in texts)
        return train_bpe(looked_at, data.tokenizer.vocab_size)
    if data.tokenizer == "characters":
        if not texts:
            raise TritiumError("data: tokenizer: characters needs text, and the data are token files")
        return characters(texts)
    if data.tokenizer is None:
        return own
    return of_folder(find(data.tokenizer))
