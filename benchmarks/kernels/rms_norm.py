"""Does the RMSNorm kernel move its bytes as fast as a copy does, for one token and many, with and without a residual?

8192 x 8192 and 131072 x 128 (QK-norm) are shapes of published figures; the others are the streams of models.
"""

import torch.nn.functional as F
from tritium.kernels.rms_norm import add_rms_norm_reference, rms_norm_reference

from ..case import Case, Draw, call, kernel
from ..peers import compiled, flashinfer, liger
from ..shapes import ITEM, MODELS, spec

EPS = 1e-6


def norm(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(width)

    def definition(x, weight):  # type: ignore[no-untyped-def]
        return rms_norm_reference(x, weight, EPS)

    return Case(
        name=f"{rows} x {width}",
        make=make,
        ours=kernel("rms_norm", None, EPS),
        definition=definition,
        reads=(rows * width + width) * ITEM,
        writes=rows * width * ITEM,
        flop=4 * rows * width,
        peers={
            "torch": call(definition),
            "torch.compile": compiled(definition),
            "F.rms_norm": call(lambda x, weight: F.rms_norm(x, (width,), weight, EPS)),
            "liger": liger("rms_norm", "LigerRMSNormFunction", lambda x, weight: (x, weight, EPS, 0.0, "llama", False)),
            "flashinfer": flashinfer(lambda package, x, weight: lambda: package.norm.rmsnorm(x, weight, EPS)),
        },
    )


def add_norm(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(rows, width), draw.normal(width)

    def definition(x, residual, weight):  # type: ignore[no-untyped-def]
        return add_rms_norm_reference(x, residual, weight, EPS)

    return Case(
        name=f"residual {rows} x {width}",
        make=make,
        ours=kernel("rms_norm", "add_rms_norm", EPS),
        definition=definition,
        reads=(2 * rows * width + width) * ITEM,
        writes=2 * rows * width * ITEM,
        flop=5 * rows * width,
        peers={"torch": call(definition), "torch.compile": compiled(definition)},
    )


WIDTHS = [spec(model).embedding_dim for model in MODELS]
CASES = [
    norm(8192, 8192),
    norm(131072, 128),
    *(norm(rows, width) for width in WIDTHS for rows in (1, 4096)),
    add_norm(8192, 8192),
    *(add_norm(rows, width) for width in WIDTHS[1:2] for rows in (1, 4096)),
]
SMOKE = [norm(3, 64), add_norm(2, 48)]
