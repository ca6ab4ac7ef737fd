"""Text to token ids and back: a checkpoint's tokenizer, its chat template, and streaming in whole characters."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from tokenizers import Tokenizer as FastTokenizer

from .errors import TritiumError
from .files import read_json, read_text
from .generation import SamplingOptions
from .rank_tokenizer import RankSettings, build, chat_pieces, without_special_tokens
from .sandbox import Sandbox

Messages = Sequence[Mapping[str, Any]]

MAX_TEMPLATE = 256 * 1024  # characters
MAX_RENDERED = 16 * 1024 * 1024


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which templates use to mark the assistant's text: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own interface

    def parse(self, parser: Any) -> Any:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(lineno)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def render_chat(template: str, messages: Messages, where: str = "chat template", **variables: Any) -> str:
    """Renders a Hugging Face chat template in jinja2's immutable sandbox.

    Raises TritiumError for a template that is malformed, oversized, refuses the messages, or reaches outside.
    """
    if len(template) > MAX_TEMPLATE:
        raise TritiumError(f"{where}: {len(template)} characters, more than the {MAX_TEMPLATE} allowed")
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    pieces: list[str] = []
    size = 0
    try:
        for piece in environment.from_string(template).generate(messages=messages, **variables):
            size += len(piece)
            if size > MAX_RENDERED:
                raise TritiumError(f"{where}: renders to more than {MAX_RENDERED} characters")
            pieces.append(piece)
    except TritiumError:
        raise
    except Exception as error:  # a template is foreign code: whatever it raises is its own mistake
        reason = (str(error) or "no reason given").splitlines()[0]
        raise TritiumError(f"{where}: {type(error).__name__}: {reason}") from None
    return "".join(pieces)


class Tokenizer:
    """A checkpoint's tokenizer. `eos_ids` and `defaults` come from its generation_config.json and config.json.

    With `markers`, which must be special tokens of `fast`, conversations hold these only where the template puts them.
    """

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
        eos_ids: Sequence[int] = (),
        defaults: Mapping[str, Any] | None = None,
        markers: Sequence[str] = (),
        where: str = "tokenizer",
    ) -> None:
        self.fast = fast
        self.chat_template = chat_template
        self.special = dict(special or {})
        self.eos_ids = tuple(eos_ids)
        self.defaults = dict(defaults or {})
        self._markers = {text: token for text in markers if (token := fast.token_to_id(text)) is not None}
        self._where = where

    @classmethod
    def found_in(cls, directory: str | Path, settings: Mapping[str, Any] | None = None) -> bool:
        """Whether the folder holds a tokenizer that `from_pretrained` reads with the same settings."""
        names = ["tokenizer.json", *([] if settings is None else [RankSettings.of(settings).ranks])]
        return any((Path(directory) / name).is_file() for name in names)

    @classmethod
    def from_pretrained(cls, directory: str | Path, settings: Mapping[str, Any] | None = None) -> "Tokenizer":
        """From tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json.

        Only the first must be there. A family's `settings` (see RankSettings) say which rank file stands in for it,
        which template for the checkpoint's own, and which tokens end an answer; for a base model (`chat_format: raw`)
        there is no template, and only the end of the text ends it. Raises TritiumError for what is missing or
        malformed.
        """
        directory = Path(directory)
        config, generation, model = (
            read_json(directory / name) if (directory / name).is_file() else {}
            for name in ("tokenizer_config.json", "generation_config.json", "config.json")
        )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: text for name in names if (text := _token_text(config.get(name))) is not None}
        eos = {*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))}
        template = _chat_template(directory, config)
        markers: tuple[str, ...] = ()
        stop: tuple[str, ...] = ()
        if settings is None or (directory / "tokenizer.json").is_file():
            fast = _read_fast(directory)
            if not eos and "eos_token" in special:
                stop = (special["eos_token"],)
        else:
            ranks = RankSettings.of(settings)
            if not (directory / ranks.ranks).is_file():
                raise TritiumError(f"{directory}: has neither tokenizer.json nor {ranks.ranks}")
            fast = build(directory / ranks.ranks, ranks)
            markers = ranks.special_tokens
            if generation.get("chat_format") != "raw":
                stop = ranks.stop
                template = ranks.chat_template if template is None else template
            if ranks.eos_token is not None:
                special.setdefault("eos_token", ranks.eos_token)
                stop = (ranks.eos_token, *stop)
        eos |= {token for text in stop if (token := fast.token_to_id(text)) is not None}
        return cls(
            fast,
            chat_template=template,
            special=special,
            eos_ids=sorted(eos),
            defaults=_sampling_defaults(generation, directory / "generation_config.json"),
            markers=markers,
            where=str(directory),
        )

    @property
    def vocab_size(self) -> int:
        """Ids that decode to something; a model's embedding may have more rows."""
        return self.fast.get_vocab_size(with_added_tokens=True)

    @property
    def id_limit(self) -> int:
        """One more than the largest id that decodes to something: a model must not choose those from here on."""
        return 1 + max(self.fast.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens' own spelling in it counts as those tokens."""
        return _encode(self.fast, text, add_special_tokens)

    def encode_chat(self, messages: Messages, *, enable_thinking: bool | None = None) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; as `apply_chat_template`, and in ids.

        With `markers` no message can spell one of them, and each content is encoded by itself.
        """
        if not self._markers:
            text = self.apply_chat_template(messages, enable_thinking=enable_thinking)
            return self.encode(text, add_special_tokens=False)
        plain = without_special_tokens(self.fast)
        pieces = chat_pieces(
            messages,
            tuple(self._markers),
            lambda marked: self.apply_chat_template(marked, enable_thinking=enable_thinking),
        )
        ids: list[int] = []
        for text, is_marker in pieces:
            ids += [self._markers[text]] if is_marker else _encode(plain, text, False)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return str(self.fast.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self,
        messages: Messages,
        *,
        add_generation_prompt: bool = True,
        enable_thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as the model's own text. `enable_thinking` reaches the template only when given.

        Raises TritiumError when the checkpoint has no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TritiumError(f"{self._where}: has no chat template; use a plain prompt, or a chat checkpoint")
        variables: dict[str, Any] = {**self.special, "tools": tools, "add_generation_prompt": add_generation_prompt}
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        return render_chat(self.chat_template, messages, f"{self._where}: chat template", **variables)


class StreamDecoder:
    """Token ids one by one to text, holding back what is not yet a whole character or could begin a stop string.

    The pieces that `add` returns, and `finish` last, join to exactly the decoded text, cut before the first stop.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        stop = (stop,) if isinstance(stop, str) else stop
        if any(not text for text in stop):
            raise TritiumError("stop: a stop string must not be empty")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window: list[int] = []  # the newest ids; they begin where a character does
        self._context = 0  # leading ids of the window that are there only to give the others their context
        self._emitted = 0  # characters of the window's text that are out already
        self._pending = ""  # whole text that is held back for a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is now certain."""
        if self.stopped:
            return ""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # A character whose bytes are not all there yet decodes as one U+FFFD at the end, or as one for every byte.
        whole = text.rstrip("\ufffd")
        piece = whole[self._emitted :]
        self._emitted += len(piece)
        if whole == text:
            self._window, self._context = self._window[self._context :], len(self._window) - self._context
            self._emitted = len(self._tokenizer.decode(self._window))
        return self._release(piece)

    def finish(self) -> str:
        """What is still held back when no more tokens come."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._window)[self._emitted :])
        text, self._pending = text + self._pending, ""
        self._window, self._context, self._emitted = [], 0, 0
        return text

    def _release(self, text: str) -> str:
        text = self._pending + text
        # The first stop to be complete, of two at once the longer: the same however the text falls into tokens.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self.stopped, self._pending = True, ""
            return text[: min(found)[1]]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._pending = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _read_fast(directory: Path) -> FastTokenizer:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise TritiumError(f"{directory}: has no tokenizer.json")
    try:
        fast = FastTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise TritiumError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from None
    fast.no_padding()
    fast.no_truncation()
    return fast


def _encode(fast: FastTokenizer, text: str, add_special_tokens: bool) -> list[int]:
    if not isinstance(text, str):
        raise TritiumError(f"the text must be a string, got {type(text).__name__}")
    try:
        return list(fast.encode(text, add_special_tokens=add_special_tokens).ids)
    except TypeError:  # half a surrogate pair, as a shell argument that is not UTF-8 brings it
        raise TritiumError("the text is not valid Unicode: it holds half a surrogate pair") from None
    except Exception as error:  # the library raises plain Exception, where a word has no token and none stands for it
        raise TritiumError(f"the tokenizer has no token for something in the text ({error})") from None


def _sampling_defaults(generation: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What generation_config.json says of sampling. Raises TritiumError where that makes no SamplingOptions."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    names = ("temperature", "top_k", "top_p")
    defaults = {name: generation[name] for name in names if generation.get(name) is not None}
    try:
        SamplingOptions(**defaults)
    except TritiumError as error:
        raise TritiumError(f"{where}: {error}") from None
    return defaults


def _token_text(value: Any) -> str | None:
    """tokenizer_config.json writes a special token as text or as an object with its `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> Iterator[int]:
    """An id, a list of ids, or nothing."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, int) and not isinstance(entry, bool):
            yield entry


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return read_text(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
