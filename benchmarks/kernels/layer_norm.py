"""Do the LayerNorm kernels move their bytes as fast as a copy does, and how do they stand beside torch's own?"""

from torch import Tensor
from tritium.kernels.layer_norm import layer_norm_backward_reference, layer_norm_reference

from ..case import Call, Case, Draw, call, kernel, launcher
from ..peers import compiled, liger
from ..shapes import ITEM, MODELS, spec
from .rms_norm import differentiated, liger_forward

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


def backward(rows: int, width: int) -> Case:
    def make(draw: Draw) -> tuple[object, ...]:
        return draw.normal(rows, width), draw.normal(rows, width), draw.normal(width), draw.normal(width)

    def definition(dy, x, weight, bias):  # type: ignore[no-untyped-def]
        return layer_norm_backward_reference(dy, x, weight, EPS)

    def ours(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Call:
        function = launcher("layer_norm", "layer_norm_backward")
        return lambda: function(dy, x, weight, EPS)

    return Case(
        name=f"backward {rows} x {width}",
        make=make,
        ours=ours,
        definition=definition,
        reads=(2 * rows * width + 2 * width) * ITEM,
        writes=(rows * width + 2 * width) * ITEM,
        flop=13 * rows * width,
        peers={
            "F.layer_norm": differentiated(lambda x, weight, bias: layer_norm_reference(x, weight, bias, EPS)),
            "torch.compile": compiled(definition),
            "liger": differentiated(liger_forward("layer_norm", "LigerLayerNormFunction", EPS)),
        },
    )


CASES = [
    norm(8192, 8192),
    *(norm(rows, spec(model).embedding_dim) for model in list(MODELS)[:2] for rows in (1, 4096)),
    *(backward(rows, width) for rows, width in ((16384, 4096), (4096, 1024), (8192, 8192))),
]
SMOKE = [norm(3, 64), backward(3, 64)]
