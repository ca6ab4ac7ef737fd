"""The tokenizer of a run: the model's own, a folder's, one of characters, or one trained on the text; and its files."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer

from ..errors import TritiumError
from ..tokenizer import Tokenizer

Ids = NDArray[Any]
END = "<|endoftext|>"
# Words with the space before them, punctuation with the line ends after it, so that ":\n" can be one token.
WORDS = r"'(?:s|t|re|ve|m|ll|d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Beside weights and config.json, which are the new model's own.
COPIED = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COPIED_TOO = ("*.tiktoken", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, what stands at a document's ends, and the files that bring it into a checkpoint."""

    tokenizer: Tokenizer
    folder: Path | None  # whose files they are; None: it was made here

    @property
    def end(self) -> int | None:
        """The id that ends a document."""
        text = self.tokenizer.special.get("eos_token")
        token = None if text is None else self.tokenizer.fast.token_to_id(text)
        return token if token is not None else next(iter(self.tokenizer.eos_ids), None)

    @property
    def opening(self) -> int | None:
        """The id that opens a document: what the tokenizer puts before a text, or else what ends one."""
        return next(iter(self.tokenizer.encode("")), self.end)

    def save(self, directory: Path) -> None:
        """Writes the tokenizer's files, so that the folder reads as a checkpoint."""
        if self.folder is not None:
            for path in sorted({path for pattern in (*COPIED, *COPIED_TOO) for path in self.folder.glob(pattern)}):
                shutil.copyfile(path, directory / path.name)
            return
        self.tokenizer.fast.save(str(directory / "tokenizer.json"))
        marks = {"bos_token": END, "eos_token": END} if self.end is not None else {}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **marks}
        ids = {} if self.end is None else {"bos_token_id": self.end, "eos_token_id": self.end}
        for name, values in (("tokenizer_config.json", settings), ("generation_config.json", ids)):
            (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def of_folder(folder: Path, settings: Mapping[str, Any] | None = None) -> Vocabulary:
    """The tokenizer of a checkpoint folder, with its family's settings. Raises TritiumError where there is none."""
    return Vocabulary(Tokenizer.from_pretrained(folder, settings), folder)


def characters(texts: Iterable[str]) -> Vocabulary:
    """Every character of the texts is a token, in the order of their code points. There is no end of text."""
    letters = sorted({letter for text in texts for letter in text})
    fast = FastTokenizer(models.WordLevel({letter: index for index, letter in enumerate(letters)}))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    return Vocabulary(Tokenizer(fast), None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Vocabulary:
    """A byte-level BPE tokenizer with an end of text, id 0: every text has an encoding, and decoding gives it back."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return Vocabulary(Tokenizer(fast, special={"bos_token": END, "eos_token": END}, eos_ids=[0]), None)


def merge_parts(tokenizer: Tokenizer) -> Ids:
    """[V, 2]: the two ids that each token was merged from, -1 for tokens that are not merges.

    Raises TritiumError for a tokenizer that merges nothing.
    """
    model = json.loads(tokenizer.fast.to_str())["model"]
    if not model.get("merges"):
        raise TritiumError("data: merge_dropout: the tokenizer has no merges (it is not a BPE tokenizer)")
    vocabulary = tokenizer.fast.get_vocab(with_added_tokens=True)
    parts = np.full((1 + max(vocabulary.values()), 2), -1, dtype=np.int64)
    for merge in reversed(model["merges"]):  # a token that two merges give is split by the earlier one
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        parts[vocabulary[left + right]] = vocabulary[left], vocabulary[right]
    return parts
