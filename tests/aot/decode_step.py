"""The step in one launch: every row of the tables, both kinds of attention, biases, 8 bits, float32."""

from functools import partial

import torch
from tritium.kernels.decode_step import decode_step
from tritium.kernels.step_tables import StepLayers

from .matrix import Case, meta

CONTEXT, PAGES, PAGE, EPS = 4096, 64, 256, 1e-6


def call(
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    hidden: int,
    vocabulary: int,
    rows: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    rope: torch.dtype | None = None,
    norm: str = "weighted",
    rotates: tuple[bool, ...] = (True,),
    biased: bool = False,
    bits: int = 16,
    window: int = 0,
) -> None:
    packed = (heads + 2 * kv_heads) * head_dim
    cache = meta(kv_heads, PAGES, PAGE, head_dim, dtype=dtype)

    def weights(height: int, depth: int) -> list[torch.Tensor]:
        stored = {8: torch.int8, 4: torch.uint8}.get(bits, dtype)
        return [meta(height, depth // 2 if bits == 4 else depth, dtype=stored) for _ in rotates]

    def scales(height: int, depth: int) -> list[torch.Tensor] | None:
        if bits == 4:
            return [meta(height, depth // 64, dtype=dtype) for _ in rotates]
        return [meta(height, dtype=torch.float32) for _ in rotates] if bits == 8 else None

    shapes = ((packed, width), (width, heads * head_dim), (2 * hidden, width), (width, hidden))
    qkv, out, up, down = (weights(*shape) for shape in shapes)
    layers = StepLayers(
        [meta(width, dtype=dtype) for _ in rotates], qkv, out, [meta(width, dtype=dtype) for _ in rotates], up, down,
        [cache for _ in rotates], [cache for _ in rotates], rotates,
        [norm == "weighted" or (norm == "unweighted" and rotated) for rotated in rotates], [window for _ in rotates],
        [meta(heads + kv_heads, head_dim, dtype=dtype) for _ in rotates] if norm == "weighted" else None,
        [meta(packed, dtype=dtype) for _ in rotates] if biased else None, None, None, None,
        *(scales(*shape) for shape in shapes),
    )  # fmt: skip
    quantised = bits < 16
    decode_step(
        meta(vocabulary, width, dtype=dtype),
        meta(rows, dtype=torch.int64),
        layers,
        meta(width, dtype=dtype),
        meta(vocabulary, width, dtype=torch.int8 if quantised else dtype),
        EPS,
        heads,
        kv_heads,
        meta(CONTEXT, 2, head_dim // 2, dtype=torch.float32),
        meta(rows, dtype=torch.int64),
        rope or dtype,
        norm == "weighted",
        None,
        meta(rows, dtype=torch.int64),
        meta(rows, 16, dtype=torch.int32),
        meta(rows, dtype=torch.int32),
        head_dim**-0.5,
        head_scale=meta(vocabulary, dtype=torch.float32) if quantised else None,
    )


def case(name: str, *args: int, **options: object) -> Case:
    archs = ("sm_80", "sm_90", "sm_100")  # gfx942 has no row
    return Case(name, partial(call, *args, **options), wide=True, only=archs)  # type: ignore[arg-type]


QWEN3 = (1024, 16, 8, 128, 3072, 151936)  # 0.6B
MOBILELLM = (1536, 24, 6, 64, 6144, 128256)  # 950M
QWEN2 = (896, 14, 2, 64, 4864, 151936)  # 0.5B
KINDS = {"rope": torch.float32, "norm": "unweighted", "rotates": (True, True, True, False)}
CASES = [
    case("qwen3 bfloat16", *QWEN3),
    case("qwen3 many bfloat16", *QWEN3, rows=16),
    case("qwen3 4 bits bfloat16", *QWEN3, bits=4),
    case("mobilellm bfloat16", *MOBILELLM, **KINDS),
    case("qwen2 8 bits float16", *QWEN2, dtype=torch.float16, norm="none", biased=True, window=512, bits=8),
    case("small float32", 256, 4, 2, 64, 704, 4096, dtype=torch.float32),
]
