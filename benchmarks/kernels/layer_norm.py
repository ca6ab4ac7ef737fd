"""Does the LayerNorm kernel move its bytes as fast as a copy does, and how does it stand beside torch's own?"""

from tritium.kernels.layer_norm import layer_norm_reference

from ..case import Case, Draw, call, kernel
from ..peers import compiled, liger
from ..shapes import ITEM, MODELS, spec

EPS = 1e-5


def norm(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(width), draw.normal(width)

    def definition(x, weight, bias):  # type: ignore[no-untyped-def]
        return layer_norm_reference(x, weight, bias, EPS)

    return Case(
        name=f"{rows} x {width}",
        make=make,
        ours=kernel("layer_norm", None, EPS),
        definition=definition,
        reads=(rows * width + 2 * width) * ITEM,
        writes=rows * width * ITEM,
        flop=7 * rows * width,
        peers={
            "F.layer_norm": call(definition),
            "torch.compile": compiled(definition),
            "liger": liger("layer_norm", "LigerLayerNormFunction", lambda x, weight, bias: (x, weight, bias, EPS)),
        },
    )


CASES = [
    norm(8192, 8192),
    *(norm(rows, spec(model).embedding_dim) for model in list(MODELS)[:2] for rows in (1, 4096)),
]
SMOKE = [norm(3, 64)]
