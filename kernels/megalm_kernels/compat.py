"""What depends on Triton's and torch's version, and on whether there is a Triton at all. Importing this file imports neither."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def assume_constant(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result: a compiler calls it and does not look inside.

    Torch's own imports the whole compiler to set this one attribute: a second of CPU time, and more in every start of a rank.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def undecorated(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch's that a compiler is not to look into, as it is below the decorator that says so, which at the first
    call imports that whole compiler. For calls that nobody compiles."""
    return getattr(function, "__wrapped__", function)


@cache
def installed() -> bool:
    """Whether triton can be imported; it is not imported to find out."""
    return importlib.util.find_spec("triton") is not None


@cache
def interpreting() -> bool:
    """Whether this process runs Triton kernels in the interpreter, on the CPU (TRITON_INTERPRET=1, read once)."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0") == "1"


def version() -> str:
    """Triton's."""
    import triton

    return triton.__version__


def cache_folder() -> Path:
    """Where Triton keeps what it has compiled."""
    from triton import knobs

    return Path(knobs.cache.dir)


def mend_parsing() -> None:
    """Let one thread at a time parse a kernel's source; call before kernels are compiled in several threads.

    Python 3.11 counts the depth of the tree that `ast.parse` builds in one place for all threads. Where the garbage collector
    runs meanwhile and hands over to another thread that parses too, both end with a SystemError about a depth mismatch.
    """
    from triton.runtime.jit import JITCallable

    parse, lock = JITCallable.parse, threading.Lock()
    if getattr(parse, "mended", False):
        return

    def parse_alone(self: Any) -> Any:
        with lock:
            return parse(self)

    parse_alone.mended = True  # type: ignore[attr-defined]
    JITCallable.parse = parse_alone


def mend_interpreter() -> None:
    """Make the interpreter compute bf16 as a GPU does; call before the first launch.

    As shipped (3.6 to 3.9) it cuts fp32 off instead of rounding it to bf16, and multiplies bf16 matrices as the integers
    that hold them. And Triton 3.6 turns one-element arrays into indices in a way that numpy 2.4 refuses.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "mended", False):
        return
    np = interpreter.np
    convert, dot, patch = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
        nearest = rounding in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if source != tl.float32 or target != tl.bfloat16 or not nearest:
            return convert(x, source, target, rounding)
        x = np.ascontiguousarray(x)
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to nearest, ties to even
        return np.where(np.isnan(x.view(np.float32)), np.uint16(0x7FC0), rounded)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widen(a), _widen(b), *rest)

    def _widen(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def patch_tensor(tensor: Any, *rest: Any) -> Any:
        result = patch(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()
        return result

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor
    interpreter.mended = True
