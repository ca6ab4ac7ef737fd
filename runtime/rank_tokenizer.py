"""Tokenizers from a file of ranks (`*.tiktoken`), as Qwen1's checkpoints have them, and prompts nobody can forge.

Such a file lists byte strings with their ranks, which are also their ids. A text is cut into pieces by a pattern, and
in each piece the two neighbours that together have the lowest rank become one, the leftmost first, until no two do. A
piece that is itself in the file is that token, whatever the merges would give.
"""

import binascii
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from .errors import TritiumError, nearest

LONGEST = 1024  # bytes of one token; trying every way to cut one takes the square of it
NORMALIZERS = {"NFC": normalizers.NFC}

# Byte-level BPE writes a byte as a printable character: itself, or in order one of those from U+0100 on.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTERS = {byte: chr(byte) if byte in _PRINTABLE else chr(0x100 + _OTHERS.index(byte)) for byte in range(256)}


@dataclass(frozen=True)
class RankSettings:
    """What a family says of its rank file (`tokenizer` in family.yaml): the file holds the ranks and nothing else."""

    ranks: str  # the file's name
    pattern: tuple[str, ...]  # what cuts a text into pieces: regular expressions, the first that matches counts
    special_tokens: tuple[str, ...]  # with the ids that follow the ranks; {0..204} stands for a token a number
    first_special_id: int | None = None  # the number of ranks that a whole file has
    normalizer: str | None = None
    eos_token: str | None = None  # ends a text
    stop: tuple[str, ...] = ()  # end an answer too, where the checkpoint is one that chats
    chat_template: str | None = None  # of a checkpoint that chats and brings none

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "tokenizer") -> "RankSettings":
        """Raises TritiumError for unknown or missing keys, and for tokens that cannot be special or are not."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise TritiumError(f"{where}: unknown key {unknown[0]!r}; {nearest(unknown[0], known)}")
        if missing := [name for name in ("ranks", "pattern", "special_tokens") if name not in values]:
            raise TritiumError(f"{where}: missing {', '.join(missing)}")
        special = tuple(token for entry in values["special_tokens"] for token in _numbered(entry))
        lists = {name: tuple(values.get(name, ())) for name in ("pattern", "stop")}
        settings = cls(**{**values, **lists, "special_tokens": special})
        if settings.normalizer is not None and settings.normalizer not in NORMALIZERS:
            raise TritiumError(f"{where}: unknown normalizer {settings.normalizer!r}; known: {', '.join(NORMALIZERS)}")
        if short := [token for token in special if len(token) < 2]:  # could not be marked as text within a message
            raise TritiumError(f"{where}: special token {short[0]!r} must have two characters or more")
        for token in (*settings.stop, *([settings.eos_token] if settings.eos_token else [])):
            if token not in special:
                raise TritiumError(f"{where}: {token!r} is none of the special_tokens")
        return settings


def _numbered(entry: str) -> list[str]:
    """`<x_{0..2}>` -> `<x_0>`, `<x_1>`, `<x_2>`; a text without such a range as it is."""
    if (match := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", entry)) is None:
        return [entry]
    head, low, high, tail = match.groups()
    return [f"{head}{number}{tail}" for number in range(int(low), int(high) + 1)]


def build(path: str | Path, settings: RankSettings) -> FastTokenizer:
    """The tokenizer of a rank file.

    Its merges are all ways to cut a token of the file into two others, by the token's rank. That is the definition
    above but for one thing: among the cuts of one token a list has an order, where the definition takes the leftmost.
    It makes no difference, whatever the ranks. Until a span of bytes is one token nothing crosses its ends, so what is
    merged inside depends on these bytes alone: every time a token is made, it is made of the same two parts, and its
    other cuts never stand side by side.

    Raises TritiumError, with file and line, for what is no rank file or not a whole one.
    """
    path = Path(path)
    ranks = read_ranks(path)
    if settings.first_special_id not in (None, len(ranks)):
        raise TritiumError(f"{path}: holds {len(ranks)} tokens instead of {settings.first_special_id}; is it whole?")
    tokens = {token.decode("latin-1").translate(_LETTERS): rank for token, rank in ranks.items()}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(tokens, key=tokens.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in tokens and token[cut:] in tokens
    ]
    fast = FastTokenizer(models.BPE(tokens, merges, ignore_merges=True))
    if settings.normalizer is not None:
        fast.normalizer = NORMALIZERS[settings.normalizer]()
    split = pre_tokenizers.Split(Regex("|".join(settings.pattern)), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    fast.decoder = decoders.ByteLevel()
    # Normalised first, since a combining character can change a marker's last letter.
    fast.add_special_tokens([AddedToken(token, special=True, normalized=True) for token in settings.special_tokens])
    for place, token in enumerate(settings.special_tokens):
        if fast.token_to_id(token) != len(ranks) + place:
            raise TritiumError(f"{path}: the special token {token!r} is there twice, or among the ranks")
    return fast


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank of a file with `base64 SPACE rank` on every line.

    The ranks must be 0 to the number of tokens less one, in any order, and every single byte must have one. Raises
    TritiumError that names file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TritiumError(f"{path}: cannot be read ({error.strerror})") from None
    ranks: dict[bytes, int] = {}
    line_of: dict[int, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        text, _, digits = line.partition(b" ")
        try:
            token = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error:
            token = b""
        if not token or not digits.isdigit() or len(digits) > 9:
            raise TritiumError(f"{path}, line {number}: must be a token in base64, a space and its rank")
        if len(token) > LONGEST:
            raise TritiumError(f"{path}, line {number}: a token of {len(token)} bytes, more than the {LONGEST} allowed")
        rank = int(digits)
        if token in ranks:
            raise TritiumError(f"{path}, line {number}: the token of line {line_of[ranks[token]]} again")
        if rank in line_of:
            raise TritiumError(f"{path}, line {number}: rank {rank} is that of line {line_of[rank]} too")
        ranks[token], line_of[rank] = rank, number
    if line_of and (largest := max(line_of)) >= len(ranks):
        missing = next(rank for rank in range(largest) if rank not in line_of)
        raise TritiumError(f"{path}, line {line_of[largest]}: rank {largest}, but no line has rank {missing}")
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TritiumError(f"{path}: has no token for the byte 0x{absent[0]:02X}, so that it cannot write every text")
    return ranks


def without_special_tokens(fast: FastTokenizer) -> FastTokenizer:
    """A tokenizer of the same model, not a copy of it, to which special tokens' spelling is text like any other."""
    plain = FastTokenizer(fast.model)
    plain.normalizer, plain.pre_tokenizer, plain.decoder = fast.normalizer, fast.pre_tokenizer, fast.decoder
    return plain


def chat_pieces(
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Sequence[str],
    render: Callable[[Sequence[Mapping[str, Any]]], str],
) -> Iterator[tuple[str, bool]]:
    """A rendered conversation in (text, whether it is a special token), to be encoded one by one.

    Special tokens come from the template alone: what the messages spell stays text. A message's content is a piece of
    its own, so that nothing merges across its ends. Both hold for templates that change the content, too: the
    messages reach them with marks in them that nobody can guess, and that are taken out again.
    """
    # In Braille, which no filter changes: it has no case, is no white space, and Python writes it as itself.
    secret = "".join(chr(0x2800 + byte) for byte in secrets.token_bytes(16))
    border, split = f"{secret}0", f"{secret}1"
    known = frozenset(special_tokens)
    either = "|".join(map(re.escape, special_tokens))
    begins = re.compile(f"(?=(?:{either})).", re.DOTALL)  # looks ahead: one may begin within another

    def marked(value: Any, key: str = "") -> Any:
        if isinstance(value, str):
            text = begins.sub(lambda first: first[0] + split, value)
            return f"{border}{text}{border}" if key == "content" else text
        if isinstance(value, Mapping):
            return {marked(name): marked(entry, name) for name, entry in value.items()}
        if isinstance(value, list | tuple):
            return [marked(entry) for entry in value]
        if value is None or isinstance(value, int | float):
            return value
        raise TritiumError(f"messages: must hold text, lists and mappings, got {type(value).__name__}")

    for text in re.split(f"({either})|{border}", render(marked(messages))):
        if text:
            yield (text, True) if text in known else (text.replace(split, ""), False)
