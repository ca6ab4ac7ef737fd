"""The engine: requests in, tokens out, many at a time over one paged cache, each with the bits that it has alone.

Every turn seats who can be seated, takes prompts further by at most `at_once` tokens in one forward, and lets those
whose prompts are through decode. A prompt in pieces, pages in any order and neighbours change no bit on the Triton
path, and what was in the cache before is what would be computed again: see docs/architecture/serving.md.
"""

import secrets
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from ..batch import Batch
from ..decoder import Decoder
from ..errors import TritiumError
from ..generation import AT_ONCE, SamplingOptions, check_prompts, not_numbers
from ..kv_cache import PAGE_SIZE, KVCache
from ..steps import InOrder
from ..tokenizer import Tokenizer
from .pages import Count, Pages, page_keys
from .request import Callback, Job, Reason, Request
from .rounds import DeviceRounds, HostRounds, chosen
from .scheduler import Scheduler

HOST_BYTES = 4 << 30  # of keys and values, where they lie in the host's memory and nobody said how many
LEFT = 0.85  # the part of a GPU's free memory that they take, where nobody said: the rest is for what steps need


class Engine:
    """Serves a model's requests from one cache of `tokens` tokens (None: what a GPU's memory leaves, 4 GiB on a CPU).

    At most `rows` requests are in it at once, and at most `at_once` tokens of prompts go into one forward. With
    `reuse_prefixes` the full pages of a prompt stay known, and a later prompt that begins alike starts behind them. The
    weights are those of now: an engine is for a model that stays as it is.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer | None = None,
        *,
        tokens: int | None = None,
        rows: int = 256,
        at_once: int = AT_ONCE,
        reuse_prefixes: bool = True,
    ) -> None:
        """Raises TritiumError where the cache does not fit, and for a model that several processes share."""
        for name, value in (("rows", rows), ("at_once", at_once), ("tokens", 1 if tokens is None else tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise TritiumError(f"{name}: must be a whole number of 1 or more, got {value!r}")
        if model.exchange is not None:
            raise TritiumError("an engine serves a model that one process holds: load it without --tensor-parallel")
        self.model, self.tokenizer = model, tokenizer
        self._vocabulary = None if tokenizer is None else tokenizer.id_limit
        context = model.config.context_length
        total = _pages_for(model, rows) if tokens is None else -(-tokens // PAGE_SIZE)
        total = min(total, rows * -(-context // PAGE_SIZE))
        self._order = InOrder(model.device)
        with self._order.working():
            # One page more: what rows write beyond their end goes into page 0.
            self._cache = KVCache(model.local_config, rows, context, model.dtype, model.device, pages=total + 1)
        self._at_once, self._reuse = at_once, reuse_prefixes
        with torch.inference_mode():  # with gradients it would be other kernels
            self._plan = model.bind()
            kind = HostRounds if model.kernels.name == "torch" else DeviceRounds
        self._rounds = kind(model, self._plan, self._cache, self._vocabulary)
        self._scheduler = Scheduler(Pages(total, first=1), self._cache, PAGE_SIZE, rows, at_once)
        self._epoch = model.sessions.epoch
        self._jobs: dict[Request, Job] = {}
        self._ready: deque[tuple[Job, int, Reason | None]] = deque()  # tokens that were not handed out yet
        self._submitted = 0
        self._is_running = False
        self._lock = threading.RLock()

    def submit(
        self,
        prompt: str | Sequence[int],
        options: SamplingOptions | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
        callback: Callback | None = None,
    ) -> Request:
        """A prompt, as text or token ids, for `run` to answer. It ends at one of `eos_ids` (None: the tokenizer's), or
        after as many tokens as the options say.

        Raises TritiumError for a prompt that `generate` would refuse, and for one that could never fit the cache.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise TritiumError("the prompt is text, and the engine has no tokenizer: give it one, or token ids")
            prompt = self.tokenizer.encode(prompt)
        options = SamplingOptions() if options is None else options
        if eos_ids is None:
            eos_ids = () if self.tokenizer is None else self.tokenizer.eos_ids
        request = Request(list(prompt), options, tuple(eos_ids), callback, _cancel=self._cancelled)
        check_prompts(self.model, [request.prompt], options)
        needed = -(-(len(request.prompt) + max(options.max_new_tokens - 1, 0)) // PAGE_SIZE)
        total = self._scheduler.pages.total
        if needed > total:
            raise TritiumError(
                f"the prompt has {len(request.prompt)} tokens, and with {options.max_new_tokens} more it takes "
                f"{needed} pages of {PAGE_SIZE}; the engine has {total}: make it with tokens={needed * PAGE_SIZE}"
            )
        if not options.max_new_tokens:
            request.reason = "length"
            return request
        seed = secrets.randbits(62) if options.seed is None else options.seed
        with self._lock:
            keys = page_keys(request.prompt, PAGE_SIZE, self._root(request.prompt)) if self._reuse else []
            job = Job(request, self._submitted, seed, keys)
            self._submitted += 1
            self._jobs[request] = job
            self._scheduler.add(job)
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """Every token of every request as it comes, until none is left; more may be submitted meanwhile.

        A request whose callback raises, or whose logits are not numbers, ends with the reason "error" and a warning;
        the others go on. Left before its end, the rest waits for the next `run`. Raises TritiumError where another
        `run` is under way, or the model was moved.
        """
        if self._is_running:
            raise TritiumError("the engine runs already: take its tokens from the loop that is under way")
        self._is_running = True
        try:
            while True:
                yield from self._hand_out()
                if not self._turn():
                    return
        finally:
            self._is_running = False

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        options: SamplingOptions | None = None,
        *,
        eos_ids: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, in order; prompt i draws with the seed `seed + i`.

        Raises TritiumError as `submit` does, before any of them runs, and what a request ended with as an error.
        """
        options = SamplingOptions() if options is None else options
        requests: list[Request] = []
        try:
            for index, prompt in enumerate(prompts):
                seed = None if options.seed is None else options.seed + index
                requests.append(self.submit(prompt, replace(options, seed=seed), eos_ids=eos_ids))
            for _ in self.run():
                pass
        finally:  # of no effect on those that have ended
            for request in requests:
                request.cancel()
        for request in requests:
            if request.error is not None:
                raise request.error
        return [request.tokens for request in requests]

    def pages(self) -> Count:
        """The cache's pages: free ones, what is only remembered included, held ones, and all."""
        return self._scheduler.pages.count()

    def forget(self) -> None:
        """Forgets the prompts that were there: to be called after the weights were changed in place."""
        with self._lock:
            self._scheduler.pages.forget()

    def _root(self, prompt: Sequence[int]) -> bytes:
        """What the values of a prompt's pages depend on besides its tokens: how its angles are stretched."""
        rotaries = {layer.attention.rotary for layer in self._plan.layers} - {None}
        return repr(sorted({rotary.stretch(len(prompt)) for rotary in rotaries if rotary is not None})).encode()

    def _cancelled(self, request: Request) -> None:
        with self._lock:
            if request.reason is None:
                self._end(request, "cancelled")

    def _end(self, request: Request, reason: Reason, error: Exception | None = None) -> None:
        request.reason, request.error = reason, error
        job = self._jobs.pop(request, None)
        if job is not None:
            self._scheduler.remove(job)

    def _hand_out(self) -> Iterator[tuple[Request, int]]:
        while self._ready:
            job, token, reason = self._ready.popleft()
            request = job.request
            if request.reason is not None:  # cancelled since
                continue
            if reason == "error":
                self._fail(request, not_numbers(self.model))
                continue
            request.tokens.append(token)
            if reason is not None:
                self._end(request, reason)
            if request.callback is not None:
                try:
                    request.callback(request, token)
                except Exception as error:
                    self._fail(request, error)
                    continue
            yield request, token

    def _fail(self, request: Request, error: Exception) -> None:
        with self._lock:
            self._end(request, "error", error)
        warnings.warn(f"a request ended, the others go on: {type(error).__name__}: {error}", RuntimeWarning, 4)

    @contextmanager
    def _working(self) -> Iterator[None]:
        with self._lock, torch.inference_mode(), self._order.working():
            yield

    def _turn(self) -> bool:
        """One prefill and one round of steps, of whoever there is. Returns whether there was anybody."""
        if not self._jobs:
            return False
        if self._epoch != self.model.sessions.epoch:
            raise TritiumError("the model was moved, or cast, since its engine was made: make another")
        scheduler = self._scheduler
        with self._working():
            scheduler.admit()
            if pieces := scheduler.pieces():
                self._prefill(pieces)
            decoding = [job for job in scheduler.seated if not job.prefilling]
            if decoding:
                self._decode(decoding, waits=any(job.prefilling for job in scheduler.seated))
        return True

    def _prefill(self, pieces: Sequence[tuple[Job, int]]) -> None:
        """Takes prompts further; of those that are through, the first token."""
        rows = [self._placed(job) for job, _ in pieces]
        counts = [count for _, count in pieces]
        tokens = [token for job, count in pieces for token in job.prompt[job.held : job.held + count]]
        batch = Batch.appended(self._cache, rows, counts, [len(job.prompt) for job, _ in pieces])
        logits = self.model.run(self._plan, torch.tensor(tokens, device=self.model.device), batch, last_only=True)[1]
        ends = [index for index, (job, count) in enumerate(pieces) if job.held + count == len(job.prompt)]
        through = [pieces[index][0] for index in ends]
        first = chosen(self.model, logits[ends], through, self._vocabulary) if through else []
        for job, count in pieces:
            self._scheduler.note(job, count)
        for job, token in zip(through, first, strict=True):
            self._take(job, token)

    def _decode(self, decoding: Sequence[Job], waits: bool) -> None:
        """A round of steps: of one, where prompts wait to go on."""
        count = 1 if waits else min(self._rounds.ahead, max(job.left for job in decoding))
        count = min(count, *(self._cache.capacity - job.held for job in decoding))
        jobs = self._scheduler.grow(count)
        for job in jobs:
            self._placed(job)
        if not jobs:
            return
        for step in self._rounds.run(jobs, count):
            for job, token in zip(jobs, step, strict=True):
                if job.row is not None:  # it did not end in a step before
                    self._take(job, token)

    def _placed(self, job: Job) -> int:
        """A job's row, of which the cache is told what it holds."""
        assert job.row is not None
        self._cache.lengths[job.row] = job.held
        self._cache.prompts[job.row] = len(job.prompt)
        return job.row

    def _take(self, job: Job, token: int) -> None:
        """Notes a job's next token; with its last its pages are free."""
        job.tokens.append(token)
        reason: Reason | None = None
        if token < 0:
            reason = "error"
        elif token in job.request.eos_ids:
            reason = "stop"
        elif not job.left:
            reason = "length"
        self._ready.append((job, token, reason))
        if reason is not None:
            self._scheduler.remove(job)


def _pages_for(model: Decoder, rows: int) -> int:
    """How many pages the cache is to have, where nobody said."""
    spec = model.local_config
    page = 2 * spec.num_cache_slots * spec.num_kv_heads * spec.head_dim * PAGE_SIZE * model.dtype.itemsize
    room = HOST_BYTES
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        cached = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        room = int(LEFT * (free + cached))
    return max(1, room // page)
