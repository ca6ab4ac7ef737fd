"""The other implementations: each is a contender, and raises where it cannot run here, which its row then says."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .case import Call, Prepare


def compiled(function: Callable[..., Any]) -> Prepare:
    """torch.compile in its default mode, for the shapes that it is called with; compiling is not timed."""

    def prepare(*args: Any) -> Call:
        if not args[0].is_cuda:
            raise RuntimeError("compared on a GPU only")
        torch._dynamo.config.recompile_limit = 256  # every shape is a specialisation of its own
        fast = torch.compile(function, dynamic=False, fullgraph=True)
        fast(*args)
        return lambda: fast(*args)

    return prepare


def liger(module: str, name: str, arrange: Callable[..., tuple[Any, ...]]) -> Prepare:
    """Liger-Kernel's autograd function `liger_kernel.ops.<module>.<name>`, on what `arrange` makes of the inputs."""

    def prepare(*args: Any) -> Call:
        function = getattr(import_module(f"liger_kernel.ops.{module}"), name)
        given = arrange(*args)

        def run() -> Any:
            with torch.no_grad():
                return function.apply(*given)

        return run

    return prepare


def flashinfer(bind: Callable[..., Call]) -> Prepare:
    """FlashInfer: `bind(flashinfer, *inputs)` gives the call."""

    def prepare(*args: Any) -> Call:
        return bind(import_module("flashinfer"), *args)

    return prepare


def sdpa(backend: str, arrange: Callable[..., tuple[Tensor, Tensor, Tensor]], causal: bool, scale: float) -> Prepare:
    """One backend of scaled_dot_product_attention over [1, H, T, D] as `arrange` gives them; out [T, Hq, D]."""

    def prepare(*args: Any) -> Call:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        kind = getattr(SDPBackend, backend)
        q, k, v = arrange(*args)
        grouped = q.shape[1] != k.shape[1]

        def run() -> Tensor:
            with sdpa_kernel(kind):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
            return out.transpose(1, 2).flatten(0, 1)

        return run

    return prepare
