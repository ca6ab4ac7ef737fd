"""Text to ids and back, streaming in whole characters, stop strings, and what a checkpoint's files say."""

import functools
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from tritium.runtime.errors import TritiumError
from tritium.runtime.tokenizer import StreamDecoder, Tokenizer

from tests.tiny import byte_level, tokenizer

TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from([*"ab E\n", "END", "é", "中文", "😀", "👨‍👩‍👧‍👦", "🇩🇪", "e\u0301", "\ufffd", "\x00"]),
        max_size=20,
    ).map("".join),
)


@functools.cache
def byte_fallback() -> FastTokenizer:
    """SentencePiece's kind, as Llama and Gemma have it: words with a leading mark, and a token a byte for the rest."""
    words = ["<unk>", "▁", "▁a", "▁the", "a", "b", "the", "E", "N", "D", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("▁", "a")]
    vocab = {word: index for index, word in enumerate(words)}
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast


def stream(decoder: StreamDecoder, ids: Iterable[int]) -> list[str]:
    """All pieces, the last one from `finish`."""
    return [*(decoder.add(token) for token in ids), decoder.finish()]


def bytes_to_ids(raw: bytes) -> list[int]:
    """One token a byte, whatever merges there are."""
    vocab = byte_level().get_vocab()
    letters = pre_tokenizers.ByteLevel.alphabet()
    # The alphabet writes printable bytes as themselves and the others, in order, as U+0100 and up.
    others = [byte for byte in range(256) if chr(byte) not in letters]
    return [vocab[chr(256 + others.index(byte)) if byte in others else chr(byte)] for byte in raw]


# Encoding and decoding.


@settings(deadline=None, max_examples=100)
@given(TEXTS)
def test_text_survives(text: str) -> None:
    """Byte level loses nothing, whatever the text, as long as it spells no special token."""
    tok = tokenizer()
    assert tok.decode(tok.encode(text)) == text


def test_special_tokens_in_a_text_are_those_tokens() -> None:
    """A chat template's markers must become one id each; decoding drops them unless asked."""
    tok = tokenizer()
    start, end = (byte_level().token_to_id(text) for text in ("<|start|>", "<|end|>"))
    ids = tok.encode("<|start|>dog<|end|>")
    assert (ids[0], ids[-1]) == (start, end)
    assert tok.decode(ids) == "dog"
    assert tok.decode(ids, skip_special_tokens=False) == "<|start|>dog<|end|>"
    assert tok.decode([]) == ""


def test_vocab_size_counts_added_tokens() -> None:
    """Too small a number would hide a tokenizer that does not fit its model."""
    tok = tokenizer()
    assert tok.vocab_size == len(byte_level().get_vocab(with_added_tokens=True))
    assert tok.vocab_size == max(byte_level().get_vocab(with_added_tokens=True).values()) + 1


def test_post_processors_special_tokens_can_be_left_out() -> None:
    """A rendered chat brings its own BOS: adding a second one changes what the model sees."""
    fast = FastTokenizer.from_str(byte_level().to_str())
    fast.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 1)])
    tok = Tokenizer(fast)
    assert tok.encode("dog") == [1, *tokenizer().encode("dog")]
    assert tok.encode("dog", add_special_tokens=False) == tokenizer().encode("dog")


# Streaming.


def test_helper_makes_one_token_a_byte() -> None:
    """The tests below stand on it."""
    raw = bytes(range(256))
    assert len(set(bytes_to_ids(raw))) == 256
    assert tokenizer().decode(bytes_to_ids("aé中😀".encode())) == "aé中😀"


@settings(deadline=None, max_examples=150)
@given(TEXTS)
def test_pieces_of_a_text_join_and_come_as_early_as_they_can(text: str) -> None:
    """After every token exactly the whole characters are out; the text's own U+FFFD may wait for the next token."""
    tok = tokenizer()
    ids = tok.encode(text)
    decoder, out = StreamDecoder(tok), ""
    for count, token in enumerate(ids, 1):
        out += decoder.add(token)
        assert out.rstrip("\ufffd") == tok.decode(ids[:count]).rstrip("\ufffd")
        assert text.startswith(out)
    assert out + decoder.finish() == text


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 331), max_size=40))
@example([])
def test_pieces_of_any_tokens_join_to_the_decoded_text(ids: list[int]) -> None:
    """Random ids are mostly invalid UTF-8 with special and added tokens between: still not one character may differ."""
    tok = tokenizer()
    assert max(ids, default=0) < tok.vocab_size
    pieces = stream(StreamDecoder(tok), ids)
    assert "".join(pieces) == tok.decode(ids)


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=24))
@example("😀".encode()[:3] + "😀".encode())
@example("é".encode()[:1] * 5 + "é".encode())
@example(b"\x80\x80\x80a")
@example("\ufffd\ufffda".encode())
def test_pieces_of_any_bytes_join_to_the_decoded_text(raw: bytes) -> None:
    """One token a byte: truncated, stray and overlong sequences, and a real U+FFFD."""
    tok, ids = tokenizer(), bytes_to_ids(raw)
    assert "".join(stream(StreamDecoder(tok), ids)) == tok.decode(ids) == raw.decode(errors="replace")


@pytest.mark.parametrize("text", ["😀", "a中b", "👨‍👩‍👧‍👦", "naïve café", "🇩🇪x", "한국어"])
def test_no_piece_holds_half_a_character(text: str) -> None:
    """A token a byte: a character is out at its last byte, not before, and never as U+FFFD."""
    expected = []
    for character in text:
        expected += [""] * (len(character.encode()) - 1) + [character]
    decoder = StreamDecoder(tokenizer())
    assert [decoder.add(token) for token in bytes_to_ids(text.encode())] == expected
    assert decoder.finish() == ""


def test_an_unfinished_character_comes_out_of_finish() -> None:
    """The text ends where the tokens do: as decoding says, one U+FFFD."""
    pieces = stream(StreamDecoder(tokenizer()), bytes_to_ids(b"a" + "😀".encode()[:3]))
    assert pieces == ["a", "", "", "", "\ufffd"]


def test_special_tokens_between_the_bytes_of_a_character() -> None:
    """Decoding skips them, so the character is whole across them."""
    tok = tokenizer()
    first, second = bytes_to_ids("é".encode())
    ids = [first, byte_level().token_to_id("<|end|>"), second]
    assert stream(StreamDecoder(tok), ids) == ["", "", "é", ""]


def byte_fallback_ids(text: str) -> list[int]:
    return list(byte_fallback().encode(text).ids)


@pytest.mark.parametrize("text", ["a 😀 the", "😀😀", "the中文b", "é", "a  b", "  a", "é a é", "👨‍👩‍👧‍👦 END"])
def test_byte_fallback_tokenizers_stream_whole_characters(text: str) -> None:
    """Their decoder writes one U+FFFD for *every* byte of an unfinished character, and takes the first space off."""
    tok = Tokenizer(byte_fallback())
    ids = byte_fallback_ids(text)
    pieces = stream(StreamDecoder(tok), ids)
    assert "".join(pieces) == tok.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


# Stop strings.


def expected_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Read a character at a time: the first stop to be complete ends the text, and of several at once the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("The dog. END of it", ["END"], "The dog. "),
        ("ENDEND", ["END"], ""),
        ("EEND x", ["END"], "E"),
        ("aab aaab", ["aaab"], "aab "),
        ("one\n\ntwo", ["\n\n", "END"], "one"),
        ("one END\n\ntwo", ["\n\n", "END"], "one "),
        ("abcabd", ["abd"], "abc"),
        ("ababac", ["abac"], "ab"),
        ("smile 😀 wave", ["😀"], "smile "),
        ("x中文y", ["文y"], "x中"),
        ("abcde", ["cde", "bcd"], "a"),
        ("abcde", ["bcde", "cd"], "ab"),
        ("no stop here", ["END", "\n"], "no stop here"),
        ("ends with EN", ["END"], "ends with EN"),
    ],
)
@pytest.mark.parametrize("split", ["tokens", "bytes"])
def test_text_is_cut_before_the_first_stop(text: str, stops: list[str], expected: str, split: str) -> None:
    """Whether the stop comes in one token or over several; nothing of it may be out already."""
    tok = tokenizer()
    decoder = StreamDecoder(tok, stops)
    out = ""
    for token in tok.encode(text) if split == "tokens" else bytes_to_ids(text.encode()):
        out += decoder.add(token)
        assert expected.startswith(out)
    out += decoder.finish()
    assert out == expected
    assert decoder.stopped == (expected_stop(text, stops)[1])


@settings(deadline=None, max_examples=200)
@given(
    st.text("abc😀", max_size=20), st.lists(st.text("abc😀", min_size=1, max_size=4), max_size=3), st.integers(0, 2**16)
)
@example("abcd"[:3] + "c", ["abcc", "bc"], 0)
def test_stops_do_not_depend_on_how_the_text_falls_into_tokens(text: str, stops: list[str], seed: int) -> None:
    """The same text in other tokens must end at the same place."""
    random_cuts = random.Random(seed)
    tok = tokenizer()
    ids: list[int] = []
    at = 0
    while at < len(text):
        size = random_cuts.randint(1, 4)
        ids += (
            tok.encode(text[at : at + size])
            if random_cuts.random() < 0.5
            else bytes_to_ids(text[at : at + size].encode())
        )
        at += size
    decoder = StreamDecoder(tok, stops)
    assert ("".join(stream(decoder, ids)), decoder.stopped) == expected_stop(text, stops)


class WordTokenizer(Tokenizer):
    """Tokens are whole strings, so that a test can choose them."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(byte_level())
        self.words = words

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[token] for token in ids)


@pytest.mark.parametrize("words", [["abcd"], ["abc", "d"], ["a", "b", "c", "d"], ["ab", "cd"]])
@pytest.mark.parametrize(("stops", "expected"), [(["abcd", "bc"], "a"), (["bc", "abc"], ""), (["cd", "bcd"], "a")])
def test_of_overlapping_stops_the_first_complete_one_counts(words: list[str], stops: list[str], expected: str) -> None:
    """However many characters a token brings; of two that end together the longer one."""
    pieces = stream(StreamDecoder(WordTokenizer(words), stops), range(len(words)))
    assert "".join(pieces) == expected


def test_what_may_begin_a_stop_is_held_back_and_let_go() -> None:
    """Held no longer than it could still become a stop, and released by finish."""
    words = ["one E", "N", "x ", "E", "N", "D"]
    decoder = StreamDecoder(WordTokenizer(words), ["END"])
    assert [decoder.add(token) for token in range(5)] == ["one ", "", "ENx ", "", ""]
    assert decoder.finish() == "EN"
    assert not decoder.stopped
    decoder = StreamDecoder(WordTokenizer(words), ["END"])
    assert stream(decoder, range(6)) == ["one ", "", "ENx ", "", "", "", ""]
    assert decoder.stopped


def test_nothing_comes_after_a_stop() -> None:
    """Tokens that were already on their way must not reopen the text."""
    words = ["a", "STOP", "b"]
    decoder = StreamDecoder(WordTokenizer(words), ["STOP"])
    assert stream(decoder, [0, 1, 2, 0]) == ["a", "", "", "", ""]
    assert decoder.finish() == ""


def test_a_stop_completed_by_an_unfinished_character() -> None:
    """finish, too, must look for stops: U+FFFD is text like any other."""
    decoder = StreamDecoder(tokenizer(), ["\ufffd"])
    assert stream(decoder, bytes_to_ids(b"ab\xf0\x9f")) == ["a", "b", "", "", ""]
    assert decoder.stopped


def test_an_empty_stop_is_refused() -> None:
    """It would end every text before its first character."""
    with pytest.raises(TritiumError, match="stop"):
        StreamDecoder(tokenizer(), ["END", ""])


def test_one_stop_as_plain_text_is_one_stop() -> None:
    """`stop="END"` must not mean the letters E, N and D."""
    pieces = stream(StreamDecoder(WordTokenizer(["No D", "END", "x"]), "END"), range(3))
    assert "".join(pieces) == "No D"
