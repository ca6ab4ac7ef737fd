"""Choosing the next token: greedy, or temperature, then top-k, then top-p.

    p = softmax(logits / temperature);  keep the k likeliest;  of those keep the shortest prefix, likeliest first, whose
    probability reaches top_p;  renormalise;  take the first token whose cumulative probability exceeds u.

A row that holds a NaN gives -1. A row whose largest logit is infinite (+inf somewhere, or -inf everywhere) gives the
first token that has it.

Shapes: logits [R, V], uniform [R] in [0, 1), tokens [R] int64.
Rounding: the definition is in float32 throughout (float64 stays). Ties are broken towards the smaller token id, so that
a result is one of the logits alone. `temperature=0` is greedy, `top_k=0` and `top_p=1` keep everything.
Randomness: u = philox(seed of the row, step), a counter-based generator (Salmon et al. 2011, Philox-4x32-10): the same
sequence draws the same numbers whatever else is in the batch, and a kernel can draw them without a state.

The kernel does not sort. The likeliest-first order is that of the logits read as unsigned integers (*keys*, as a radix
sort reads floats), and each of the three cuts asks for one key: the largest such that the tokens from there up number
k, or have the mass top_p * total, or a mass above u * total. It is found a digit at a time, as in radix selection: a
pass adds up, for each value of the next digit, the tokens that share the digits found so far, and every program of the
next pass reads off that digit. A mass is exp((x - max) / temperature), rounded down to a multiple of about V / 2^62:
masses are integers, and so are their sums, which are exact, do not depend on an order, and may be gathered by atomics
with the same bits every time. Tokens of one key share one mass, and the number of them that stay is a quotient; a token
without mass is never taken.
Floor: V * itemsize bytes read per row and pass: 1 pass greedy, else 2 + 3 a cut for 16-bit logits, 2 + 7 a cut for
float32, where the cuts are u's, and those of top_k and top_p where they are asked for. Launches: a pass each, one to
take the token, and one that zeroes the sums (3 greedy, 7 to 13 for 16 bits, 11 to 25 for float32). About 64 operations
a logit and pass.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import tuning
from .launch import launch, register, require, tl, triton
from .rms_norm import wide

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for 32-bit words kept in int64, whose own product could overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_uniform_reference(seed: Tensor, step: Tensor) -> Tensor:
    """One float32 in [0, 1) for each (seed, step): int64 tensors that broadcast. The first word of Philox-4x32-10."""
    seed, step = torch.broadcast_tensors(seed, step)
    words = [step & _MASK, (step >> 32) & _MASK, torch.zeros_like(step), torch.zeros_like(step)]
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high_a, low_a = _multiply(_ROUND_A, words[0])
        high_b, low_b = _multiply(_ROUND_B, words[2])
        words = [high_b ^ words[1] ^ key_a, low_b, high_a ^ words[3] ^ key_b, low_a]
        key_a, key_b = (key_a + _KEY_A) & _MASK, (key_b + _KEY_B) & _MASK
    return (words[0] >> 8).float() * 2.0**-24


def sample_reference(logits: Tensor, temperature: float, top_k: int, top_p: float, uniform: Tensor | None) -> Tensor:
    """The definition: logits [R, V] -> token ids [R], -1 for a row that holds a NaN.

    `uniform` may be None only when `temperature` is 0.
    """
    if temperature == 0:
        return logits.argmax(-1).masked_fill(logits.isnan().any(-1), -1)
    if uniform is None:
        raise ValueError("sampling at a temperature above 0 needs one uniform number a row")
    ordered, tokens = wide(logits).sort(dim=-1, descending=True, stable=True)
    # Differences to the likeliest token stay finite at the smallest temperature, and -inf stays that at the largest.
    limits = torch.finfo(ordered.dtype)
    ordered = (ordered - ordered[:, :1]) / min(max(temperature, limits.tiny), limits.max)
    if 0 < top_k < logits.shape[-1]:
        ordered, tokens = ordered[:, :top_k], tokens[:, :top_k]
    probabilities = ordered.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1:
        kept = cumulative - probabilities < top_p
        kept[:, 0] = True
        probabilities = probabilities * kept
        cumulative = probabilities.cumsum(-1)
    threshold = uniform.to(cumulative.dtype).unsqueeze(-1) * cumulative[:, -1:]
    # Rounding can leave the threshold at the total: the last token with any probability is then the one.
    last = ((probabilities > 0).sum(-1, keepdim=True) - 1).clamp_(min=0)
    choice = torch.minimum((cumulative <= threshold).sum(-1, keepdim=True), last)
    return tokens.gather(-1, choice).squeeze(-1).masked_fill(logits.isnan().any(-1), -1)


@triton.jit
def _keys(x, WIDTH: tl.constexpr):
    """Logits of WIDTH bits as unsigned integers of the same order; one for both zeros, the largest for every NaN."""
    SIGN: tl.constexpr = 1 << (WIDTH - 1)
    LARGEST: tl.constexpr = (1 << WIDTH) - 1
    bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) if WIDTH == 16 else x.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == SIGN, 0, bits)
    keys = tl.where(bits > SIGN, LARGEST - bits, bits + SIGN)
    wide = x.to(tl.float32)
    return tl.where(wide != wide, LARGEST, keys)


@triton.jit
def packed_keys(x, token, WIDTH: tl.constexpr):
    """Logits of WIDTH bits with their tokens: the largest is that of the likeliest, of equals of the first."""
    return (_keys(x, WIDTH).to(tl.int64) << 31) + (0x7FFFFFFF - token)


@triton.jit
def _logit(key, WIDTH: tl.constexpr, DTYPE: tl.constexpr):
    """What has this key, in float32."""
    SIGN: tl.constexpr = 1 << (WIDTH - 1)
    LARGEST: tl.constexpr = (1 << WIDTH) - 1
    key = key.to(tl.uint32)
    bits = tl.where(key >= SIGN, key - SIGN, LARGEST - key)
    if WIDTH == 16:
        return bits.to(tl.uint16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mass(x, top, scale, unit):
    """exp((x - top) / temperature) in whole units: `unit` for the likeliest, and never a NaN."""
    power = tl.where(x < top, (x - top) * scale, 0.0)
    return (tl.exp2(power) * unit).to(tl.int64)


@triton.jit
def _state(slot_ptr):
    """Where a pass stood: (the key so far, what is wanted of the tokens that share it, the mass above them)."""
    return tl.load(slot_ptr), tl.load(slot_ptr + 1), tl.load(slot_ptr + 2)


@triton.jit
def _next_digit(slot_ptr, prefix, wanted, above, COUNT: tl.constexpr, BITS: tl.constexpr):
    """The state with the digit that the sums of this slot give: the largest from which what is wanted is reached."""
    o_d = tl.arange(0, 1 << BITS)
    masses = tl.load(slot_ptr + (1 << BITS) + o_d)
    values = tl.load(slot_ptr + (2 << BITS) + o_d) if COUNT else masses
    reached = tl.sum(values, axis=0) - tl.cumsum(values, axis=0) + values  # by this digit and the larger ones
    digit = tl.sum((reached >= wanted).to(tl.int64), axis=0) - 1
    wanted -= tl.sum(tl.where(o_d > digit, values, 0), axis=0)
    above += tl.sum(tl.where(o_d > digit, masses, 0), axis=0)
    return (prefix << BITS) + digit, wanted, above


@triton.jit
def _best_kernel(
    logits_ptr,  # [R, V], rows `stride_x` apart
    work_ptr,  # [R, `stride_w`], zeros: the first of a row becomes its largest (key, smallest token)
    V,
    stride_x,
    stride_w,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    chunks = tl.cdiv(V, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    o_v = tl.program_id(0) % chunks * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride_x + o_v, mask=o_v < V, other=0.0)
    packed = packed_keys(x, o_v, WIDTH)
    tl.atomic_max(work_ptr + row * stride_w, tl.max(tl.where(o_v < V, packed, 0), axis=0), sem="relaxed")


@triton.jit(
    do_not_specialize=["slot", "source", "ended", "shift", "top_k", "stride_u"],
    do_not_specialize_on_alignment=["uniform_ptr"],  # a column of all steps' numbers: aligned at every fourth step
)
def _sums_kernel(
    logits_ptr,  # [R, V], rows `stride_x` apart
    work_ptr,  # [R, `stride_w`]: the slots of the passes
    parts_ptr,  # [R, chunks, 1 << BITS]: this pass's masses, chunk by chunk
    uniform_ptr,  # [R], `stride_u` apart
    V,
    stride_x,
    stride_w,
    stride_u,
    slot,  # this pass's
    source,  # that of the pass of the digit before
    ended,  # that of the last digit of the cut before
    shift,  # of this pass's digit
    top_k,
    top_p,
    scale,
    unit,
    CUT: tl.constexpr,  # which cut begins here; "" where one goes on or none has begun
    BEFORE: tl.constexpr,  # which cut came before it
    LEADING: tl.constexpr,  # the first digit, which all cuts share
    COUNT: tl.constexpr,  # tokens as well as masses
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    DIGITS: tl.constexpr = 1 << BITS
    chunks = tl.cdiv(V, CHUNK)
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = tl.program_id(0) % chunks
    o_d = tl.arange(0, DIGITS)
    o_v = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits_ptr + row * stride_x + o_v, mask=o_v < V, other=0.0)
    keys = _keys(x, WIDTH)
    work_ptr += row * stride_w
    top = _logit(tl.load(work_ptr) >> 31, WIDTH, logits_ptr.dtype.element_ty)
    member = o_v < V
    if not LEADING:
        source_ptr = work_ptr + source * (3 * DIGITS)
        if CUT == "":
            prefix, wanted, above = _state(source_ptr)
        else:
            if BEFORE == "":
                total = tl.sum(tl.load(work_ptr + DIGITS + o_d), axis=0)
            else:
                # What the cut before keeps: all above its key, and as many of that key as were still wanted.
                ended_ptr = work_ptr + ended * (3 * DIGITS)
                key, kept, total = _state(ended_ptr)
                key, kept, total = _next_digit(ended_ptr, key, kept, total, BEFORE == "top_k", BITS)
                mass = _mass(_logit(key, WIDTH, logits_ptr.dtype.element_ty), top, scale, unit)
                if BEFORE == "top_p":
                    kept = tl.cdiv(kept, tl.maximum(mass, 1))
                total += kept * mass
            prefix, above = tl.zeros_like(total), tl.zeros_like(total)
            if CUT == "top_k":
                wanted = above + top_k
            else:
                if CUT == "top_p":
                    product = total.to(tl.float64) * top_p
                    wanted = product.to(tl.int64)
                    wanted += (wanted.to(tl.float64) < product).to(tl.int64)
                else:
                    product = total.to(tl.float64) * tl.load(uniform_ptr + row * stride_u)
                    wanted = product.to(tl.int64) + 1
                wanted = tl.minimum(tl.maximum(wanted, 1), total)
        prefix, wanted, above = _next_digit(source_ptr, prefix, wanted, above, COUNT, BITS)
        if chunk == 0:
            slot_ptr = work_ptr + slot * (3 * DIGITS)
            tl.store(slot_ptr, prefix)
            tl.store(slot_ptr + 1, wanted)
            tl.store(slot_ptr + 2, above)
        member = member & (keys >> (shift + BITS) == prefix.to(tl.uint32))
    digits = tl.where(member, (keys >> shift) & (DIGITS - 1), DIGITS)
    masses = _mass(x.to(tl.float32), top, scale, unit)
    part = tl.sum(tl.where(digits[None, :] == o_d[:, None], masses[None, :], 0), axis=1)
    sums_ptr = work_ptr + slot * (3 * DIGITS) + DIGITS + o_d
    tl.atomic_add(sums_ptr, part, mask=part != 0, sem="relaxed")
    tl.store(parts_ptr + (row * chunks + chunk) * DIGITS + o_d, part)
    if COUNT:
        number = tl.histogram(digits.to(tl.int32), DIGITS, mask=member).to(tl.int64)
        tl.atomic_add(sums_ptr + DIGITS, number, mask=number != 0, sem="relaxed")


@triton.jit(do_not_specialize=["ended"])
def _take_kernel(
    logits_ptr,  # [R, V], rows `stride_x` apart
    work_ptr,  # [R, `stride_w`]
    parts_ptr,  # [R, chunks, 1 << BITS]: those of the last pass
    tokens_ptr,  # [R]
    V,
    stride_x,
    stride_w,
    ended,
    scale,
    unit,
    GREEDY: tl.constexpr,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    DIGITS: tl.constexpr = 1 << BITS
    row = tl.program_id(0).to(tl.int64)
    work_ptr += row * stride_w
    best = tl.load(work_ptr)
    token = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    if not GREEDY:
        chunks = tl.cdiv(V, CHUNK)
        slot_ptr = work_ptr + ended * (3 * DIGITS)
        key, wanted, above = _state(slot_ptr)
        key, wanted, above = _next_digit(slot_ptr, key, wanted, above, False, BITS)
        top = _logit(best >> 31, WIDTH, logits_ptr.dtype.element_ty)
        # The tokens of this key, by ascending id: first the chunk, then the place in it.
        o_c = tl.arange(0, BLOCK_CHUNKS)
        parts_ptr += row * chunks * DIGITS + (key & (DIGITS - 1))
        parts = tl.load(parts_ptr + o_c * DIGITS, mask=o_c < chunks, other=0)
        chunk = tl.sum((tl.cumsum(parts, axis=0) < wanted).to(tl.int32), axis=0)
        wanted -= tl.sum(tl.where(o_c < chunk, parts, 0), axis=0)
        mass = _mass(_logit(key, WIDTH, logits_ptr.dtype.element_ty), top, scale, unit)
        o_v = chunk * CHUNK + tl.arange(0, CHUNK)
        x = tl.load(logits_ptr + row * stride_x + o_v, mask=o_v < V, other=0.0)
        tied = ((_keys(x, WIDTH) == key.to(tl.uint32)) & (o_v < V)).to(tl.int32)
        place = tl.sum((tl.cumsum(tied, axis=0) < tl.cdiv(wanted, tl.maximum(mass, 1))).to(tl.int32), axis=0)
        token = tl.where(tl.abs(top) == float("inf"), token, chunk * CHUNK + place)
    tl.store(tokens_ptr + row, tl.where(best >> 31 == (1 << WIDTH) - 1, -1, token))


class Scratch(NamedTuple):
    """What sampling works in: see `sample_scratch`."""

    work: Tensor  # [R, slots]; `work[:, 0]` is where a row's largest packed key goes
    parts: Tensor


def sample_scratch(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Scratch:
    """Room for `sample` of logits such as these [R, V], their values aside, with these options; `work` is zeroed."""
    rows, vocabulary = logits.shape
    config = tuning.config("sampling", logits.device, rows=rows, itemsize=logits.itemsize)
    bits, width = config["BITS"], 8 * logits.itemsize
    cuts = _cuts(vocabulary, temperature, top_k, top_p)
    # A slot for each pass: where it stands, the masses and the numbers of its digit. Slot 0 begins with the likeliest.
    digits, levels = 1 << bits, triton.cdiv(width, bits)
    slots = (3 * digits if cuts else 1) * (1 + (levels - 1) * len(cuts))
    work = torch.zeros(rows, slots, dtype=torch.int64, device=logits.device)
    shape = (rows, triton.cdiv(vocabulary, config["CHUNK"]), digits) if cuts else (1,)
    return Scratch(work, torch.empty(shape, dtype=torch.int64, device=logits.device))


def _cuts(vocabulary: int, temperature: float, top_k: int, top_p: float) -> list[str]:
    """Which cuts are made, in order; greedy has none."""
    if temperature == 0 or top_k == 1:
        return []
    return ["top_k"] * (0 < top_k < vocabulary) + ["top_p"] * (top_p < 1) + ["u"]


def sample(
    logits: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    uniform: Tensor | None,
    *,
    out: Tensor | None = None,
    scratch: Scratch | None = None,
    begun: bool = False,
) -> Tensor:
    """The kernel: logits [R, V] -> token ids [R], -1 for a row that holds a NaN. float32, bfloat16 or float16.

    `uniform` [R] is float32, may be a view, and may be None only when `temperature` is 0. With `out` [R] and `scratch`
    nothing is allocated; the scratch is zeroed here, but where `begun` says that whoever made the logits has zeroed it
    and put each row's largest packed key into its first column. Raises RuntimeError where no kernel can run, TypeError
    and ValueError for what does not fit.
    """
    require(logits, uniform)
    if logits.ndim != 2 or not 0 < logits.shape[1] < 2**31:
        raise ValueError(f"logits must be [rows, vocabulary] with at least one token, got {list(logits.shape)}")
    rows, vocabulary = logits.shape
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if temperature > 0 and uniform is None:
        raise ValueError("sampling at a temperature above 0 needs one uniform number a row")
    if top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(f"top_k must be 0 or more and top_p above 0 and at most 1, got {top_k} and {top_p}")
    if uniform is not None and (uniform.shape != (rows,) or uniform.dtype != torch.float32):
        raise ValueError(f"uniform must be [{rows}] torch.float32, got {list(uniform.shape)} {uniform.dtype}")
    if begun and scratch is None:
        raise ValueError("what was begun is in the scratch: give it")
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device) if out is None else out
    if tokens.shape != (rows,) or tokens.dtype != torch.int64:
        raise ValueError(f"out must be [{rows}] torch.int64, got {list(tokens.shape)} {tokens.dtype}")
    if not rows:
        return tokens
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    config = dict(tuning.config("sampling", logits.device, rows=rows, itemsize=logits.itemsize))
    bits, width = config.pop("BITS"), 8 * logits.itemsize
    config["WIDTH"] = width
    chunks, levels = triton.cdiv(vocabulary, config["CHUNK"]), triton.cdiv(width, bits)
    cuts = _cuts(vocabulary, temperature, top_k, top_p)
    if scratch is None:
        scratch = sample_scratch(logits, temperature, top_k, top_p)
    elif not begun:
        scratch.work.zero_()
    work, parts = scratch
    # In powers of two. Finite and not zero: 0 * inf, no difference or an endless one, would be a NaN.
    scale = min(max(math.log2(math.e) / max(temperature, 1e-300), 2.0**-126), 2.0**127)
    unit = 2.0 ** (62 - vocabulary.bit_length())
    strides = logits.stride(0), work.stride(0)
    if not begun:
        launch(_best_kernel, (rows * chunks,), logits, work, vocabulary, *strides, **config)

    def add_up(slot: int, source: int, ended: int, level: int, **constants: str | bool) -> None:
        launch(
            _sums_kernel,
            (rows * chunks,),
            logits,
            work,
            parts,
            uniform,
            vocabulary,
            *strides,
            0 if uniform is None else uniform.stride(0),
            slot,
            source,
            ended,
            bits * (levels - 1 - level),
            top_k,
            float(top_p),
            scale,
            unit,
            LEADING=level == 0,
            BITS=bits,
            **constants,
            **config,
        )

    slot, before = 0, ""
    if cuts:
        add_up(0, 0, 0, 0, CUT="", BEFORE="", COUNT=cuts[0] == "top_k")
    for cut in cuts:
        ended, source = slot, 0
        for level in range(1, levels):
            slot += 1
            first = level == 1
            add_up(slot, source, ended, level, CUT=cut * first, BEFORE=before * first, COUNT=cut == "top_k")
            source = slot
        before = cut
    launch(
        _take_kernel,
        (rows,),
        logits,
        work,
        parts,
        tokens,
        vocabulary,
        *strides,
        slot,
        scale,
        unit,
        GREEDY=not cuts,
        BITS=bits,
        BLOCK_CHUNKS=triton.next_power_of_2(chunks),
        **config,
    )
    return tokens


register(
    "sample(Tensor logits, float temperature, int top_k, float top_p, Tensor? uniform) -> Tensor",
    sample,
    sample_reference,
    lambda logits, temperature, top_k, top_p, uniform: logits.new_empty(logits.shape[:1], dtype=torch.int64),
)
