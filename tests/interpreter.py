"""Makes Triton's interpreter compute what a GPU computes, where it does not: bfloat16, the order inside a dot.

The interpreter keeps bfloat16 as raw 16-bit words and does integer arithmetic on them, truncates when it casts to it,
and multiplies blocks with a library whose order of summation changes with the block's shape. Here bfloat16 is widened
to float32, computed with, and rounded to nearest even; a dot is exact but for one rounding to float32, so that what is
left of a difference between two batches is the kernel's own. tests/test_interpreter.py holds these against torch.
"""

import dataclasses
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 words as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 words, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Replaces the interpreter's arithmetic, once."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "computes_bfloat16", False):
        return
    builder.computes_bfloat16 = True
    original = {name: getattr(builder, name) for name in ("cast_impl", "binary_op", "unary_op", "ternary_op")}

    def wide(value: Any) -> Any:
        if isinstance(value, handle) and value.dtype.scalar == tl.bfloat16:
            return handle(widen(value.data), tl.float32)
        return value

    def round_back(result: Any, dtype: Any) -> Any:
        if dtype.scalar == tl.bfloat16 and result.dtype.scalar == tl.float32 and result.data.dtype == np.float32:
            return handle(narrow(result.data), tl.bfloat16)
        return result

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target:
            # A comparison is labelled with the type of what it compared, but holds truth values.
            truth = src.data.dtype == np.bool_ and target != tl.int1
            return handle(src.data.astype(interpreter._get_np_dtype(target)), target) if truth else src
        if source == tl.bfloat16:
            return original["cast_impl"](self, wide(src), dst_type) if target != tl.float32 else wide(src)
        if target == tl.bfloat16:
            return handle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        with np.errstate(over="ignore", invalid="ignore"):
            return original["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        return cast_impl(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        with np.errstate(all="ignore"):
            return round_back(original["binary_op"](self, wide(lhs), wide(rhs), op), lhs.dtype)

    def unary_op(self: Any, arg: Any, op: Any) -> Any:
        with np.errstate(all="ignore"):
            return round_back(original["unary_op"](self, wide(arg), op), arg.dtype)

    def ternary_op(self: Any, lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if op is np.where:  # moves words, whatever they stand for
            return original["ternary_op"](self, lhs, rhs, other, op)
        return round_back(original["ternary_op"](self, wide(lhs), wide(rhs), wide(other), op), other.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        with np.errstate(all="ignore"):
            left, right = (wide(operand).data.astype(np.float64) for operand in (a, b))
            exact = np.matmul(left, right) + d.data.astype(np.float64)
            return handle(exact.astype(d.data.dtype), d.dtype.scalar)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        with np.errstate(all="ignore"):
            exact = wide(x).data.astype(np.float64) * wide(y).data + wide(z).data
            return round_back(handle(exact.astype(np.float32), tl.float32), z.dtype)

    replaced = (cast_impl, create_fp_to_fp, binary_op, unary_op, ternary_op, create_dot, create_fma)
    for function in replaced:
        setattr(builder, function.__name__, function)
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)

    _save_time()

    # After a launch the interpreter copies every storage back, onto itself where it already is on the CPU: for a
    # storage of gigabytes that no page of which was touched, this would be the most expensive step of all.
    copy = torch.UntypedStorage.copy_

    def copy_elsewhere(self: torch.UntypedStorage, source: torch.UntypedStorage, *args: Any) -> torch.UntypedStorage:
        return self if self.data_ptr() == source.data_ptr() else copy(self, source, *args)

    torch.UntypedStorage.copy_ = copy_elsewhere  # type: ignore[method-assign]


def _save_time() -> None:
    """Does once what the interpreter does anew at every operation: most of its time goes there."""
    patch, patched = interpreter._patch_lang, set()

    class Kept:
        def restore(self) -> None:
            """This process runs nothing but the interpreter."""

    def patch_once(function: Any) -> Kept:
        if id(function.__globals__) not in patched:
            patched.add(id(function.__globals__))
            patch(function)
        return Kept()

    interpreter._patch_lang = patch_once

    # Sums and products of integers are computed again in 64 bits, for an assertion that is only made in debug mode.
    shared = interpreter.interpreter_builder
    if not shared.options.debug:
        shared.options = dataclasses.replace(shared.options, sanitize_overflow=False)

    find_dtype, dtypes = interpreter._get_np_dtype, {}

    def np_dtype(dtype: Any) -> np.dtype:
        name = dtype.scalar.name
        if name not in dtypes:
            dtypes[name] = find_dtype(dtype)
        return dtypes[name]

    interpreter._get_np_dtype = np_dtype

    block, tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[Any, Any] = {}
    shapes: dict[Any, Any] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (*shape, element_ty.name)
        if key not in blocks:
            block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty, (self.shape, self.numel, self.name) = element_ty, blocks[key]

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        key = (*type.shape,) if type.is_block() else ()
        if key not in shapes:
            tensor(self, handle, type)
            shapes[key] = self.shape, self.numel
        self.handle, self.type, self.dtype, (self.shape, self.numel) = handle, type, type.scalar, shapes[key]

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init
    tl.tuple.__eq__ = lambda self, other: tl.constexpr(self.values == list(other))
