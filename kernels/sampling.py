"""Choosing the next token: greedy, or temperature, then top-k, then top-p.

    p = softmax(logits / temperature);  keep the k likeliest;  of those keep the shortest prefix, likeliest first, whose
    probability reaches top_p;  renormalise;  take the first token whose cumulative probability exceeds u.

Shapes: logits [R, V], uniform [R] in [0, 1), tokens [R] int64.
Rounding: everything in float32 (float64 stays). Ties are broken towards the smaller token id, so that a result is one
of the logits alone. `temperature=0` is greedy, `top_k=0` and `top_p=1` keep everything.
Randomness: u = philox(seed of the row, step), a counter-based generator (Salmon et al. 2011, Philox-4x32-10): the same
sequence draws the same numbers whatever else is in the batch, and a kernel can draw them without a state.
Floor: numel(logits) * itemsize bytes read once.
"""

import torch
from torch import Tensor

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
    """The definition: logits [R, V] -> token ids [R]. `uniform` may be None only when `temperature` is 0."""
    if temperature == 0:
        return logits.argmax(-1)
    if uniform is None:
        raise ValueError("sampling at a temperature above 0 needs one uniform number a row")
    ordered, tokens = wide(logits).sort(dim=-1, descending=True, stable=True)
    # Differences to the likeliest token stay finite at the smallest temperature.
    ordered = (ordered - ordered[:, :1]) / max(temperature, torch.finfo(ordered.dtype).tiny)
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
    return tokens.gather(-1, choice).squeeze(-1)
