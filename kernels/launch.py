"""What every launcher stands on: Triton where there is one, the launch itself, and registration with torch.library.

Not an operation. Kernel files take `triton` and `tl` from here, so that their definitions also import on a machine
without Triton (macOS, Windows).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _Absent:
    """Stands in for Triton where it is not installed: decorators and annotations work, nothing can be launched."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args and callable(args[0]) else self


try:
    import triton as _triton
    import triton.language as _language
except ImportError:
    _triton = _language = _Absent()
triton: Any = _triton
tl: Any = _language

INSTALLED = not isinstance(triton, _Absent)
INTERPRETED = INSTALLED and bool(triton.knobs.runtime.interpret)
"""Kernels run on the CPU, an array operation at a time: TRITON_INTERPRET=1 was set before Triton was imported."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # bfloat16 matrix instructions and asynchronous copies
LEAST_SHARED = 166_912  # bytes that a program may have: an A100's. RTX cards, A10 and L4 give 101,376.


def obstacle(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why kernels cannot run on tensors of `device` (and `dtype`, one of DTYPES), in words; None where they can."""
    if not INSTALLED:
        return "the package triton is not installed"
    if INTERPRETED:
        if device.type != "cpu":
            return "the interpreter is on, which computes on the CPU"
        if dtype == torch.bfloat16 and not computes_bfloat16():
            return "Triton's interpreter computes bfloat16 wrongly: take float32 or float16"
        return None
    if device.type != "cuda" or device.index is None:
        if not torch.cuda.is_available():
            return "it needs a GPU that Triton drives, and torch sees none"
        if device.type != "cuda":
            return f"the tensors are on {device}, and Triton drives the GPU"
    return _gpu_obstacle(device)


@functools.cache
def _gpu_obstacle(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < OLDEST_CAPABILITY:
        return f"the GPU has compute capability {major}.{minor}, and the kernels need 8.0 or newer"
    shared = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"]
    if shared < LEAST_SHARED:
        return f"the GPU gives a program {shared} bytes of shared memory, and the kernels need {LEAST_SHARED}"
    return None


def computes_bfloat16() -> bool:
    """Whether Triton's interpreter gets bfloat16 right: only where its arithmetic was mended, as the tests do
    (tests/interpreter.py)."""
    from triton.runtime.interpreter import InterpreterBuilder

    return bool(getattr(InterpreterBuilder, "computes_bfloat16", False))


def require_able(x: Tensor) -> None:
    """Raises RuntimeError where no kernel can run on tensors such as this one."""
    if not x.is_meta and (why := obstacle(x.device, x.dtype)) is not None:
        raise RuntimeError(f"a Triton kernel cannot run here: {why}; the definition (`*_reference`) runs anywhere")


def require(x: Tensor, *others: Tensor | None) -> None:
    """Raises what a caller's mistake deserves: kernels that cannot run here, a wrong dtype, tensors apart, a gradient
    that would be lost.

    Meta tensors pass: they are compiled for, not computed with.
    """
    require_able(x)
    if x.dtype not in DTYPES:
        raise TypeError(f"a kernel takes {', '.join(map(str, DTYPES))}, got {x.dtype}")
    for other in others:
        if other is not None and other.device != x.device:
            raise ValueError(f"tensors lie on {x.device} and {other.device}: they must be on one device")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *others)):
        raise RuntimeError(
            "a launcher computes no gradients: call it under torch.no_grad(), or call torch.ops.tritium, whose "
            "operations have them"
        )


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *args: Any, **options: Any) -> None:
    """Runs `kernel` over `grid` on the device of `like`, its first argument; compiles only, where that is meta.

    Contraction of a product and a sum into one rounding is pinned: its default changes between Triton versions.
    """
    options.setdefault("enable_fp_fusion", True)
    if like.is_meta:
        kernel.warmup(like, *args, grid=grid, **options)
    elif like.is_cuda and like.get_device() != torch.cuda.current_device():
        with torch.cuda.device(like.device):
            kernel[grid](like, *args, **options)
    else:
        kernel[grid](like, *args, **options)


_LIBRARY = torch.library.Library("tritium", "DEF")


def register(
    schema: str,
    launcher: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    gradient: Callable[..., tuple[Any, ...]] | None = None,
    keep_outputs: bool = False,
) -> None:
    """Makes `torch.ops.tritium.<name>` of a launcher, for `torch.compile(fullgraph=True)`, export and other callers.

    Where no kernel can run (a CPU), the operation is its definition. `fake` computes the outputs' shapes; it is
    needless where the operation only writes into its arguments.

    `gradient(inputs, needed, *gradients)` gives a gradient, or None, for each of the inputs, of which `needed` says
    whether anything wants it; it must call registered operations, so that it can be traced. Without it, gradients are
    the definition's, computed anew from the inputs; an operation that writes into its arguments has none.
    With `keep_outputs`, the outputs are kept for it as well, and follow the inputs in `inputs`.
    """
    name = schema.partition("(")[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor)]
        if "!" in schema and torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(f"torch.ops.tritium.{name} has no gradient: call it under torch.no_grad()")
        able = obstacle(tensors[0].device, tensors[0].dtype) is None
        return (launcher if able else reference)(*args, **kwargs)

    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    torch.library.register_fake(f"tritium::{name}", fake or (lambda *args, **kwargs: None), lib=_LIBRARY)
    if "!" not in schema:
        backward = _backward_of(reference) if gradient is None else _backward_by(gradient)
        keep = _keep_all if keep_outputs else _keep_inputs
        torch.library.register_autograd(f"tritium::{name}", backward, setup_context=keep, lib=_LIBRARY)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)  # an output that nothing used has no gradient, not one of zeros to be read
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.others = [None if isinstance(value, Tensor) else (value,) for value in inputs]


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _keep_inputs(ctx, (*inputs, *(output if isinstance(output, tuple) else (output,))), output)


def _backward_by(gradient: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """The backward of autograd that calls `gradient`."""

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        inputs = tuple(next(saved) if other is None else other[0] for other in ctx.others)
        return gradient(inputs, ctx.needs_input_grad, *gradients)

    return backward


def _backward_of(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The vector-Jacobian product of a definition."""

    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if other is None else other[0] for other in ctx.others]
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad) if needed]
        with torch.enable_grad():
            for index in wanted:
                inputs[index] = inputs[index].detach().requires_grad_()
            found = reference(*inputs)
        pairs = zip(found if isinstance(found, tuple) else (found,), gradients, strict=True)
        used = [(out, gradient) for out, gradient in pairs if gradient is not None and out.requires_grad]
        if not used:  # nothing that was computed depends on an input
            return (None,) * len(inputs)
        outputs, given = zip(*used, strict=True)
        computed = torch.autograd.grad(outputs, [inputs[index] for index in wanted], given, allow_unused=True)
        result: list[Tensor | None] = [None] * len(inputs)
        for index, gradient in zip(wanted, computed, strict=True):
            result[index] = gradient
        return tuple(result)

    return backward
