"""More elements than int32 counts, on any machine: memory that is only promised, and of the programs the last ones only.

On a GPU the buffers are real and all programs run. Each case runs in a process of its own, of which a wrong address is the end.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.kernels.device.conftest import ALLOCATORS

COUNT = 2**31 + 2**14


def run_far(module: str, function: str, device: torch.device) -> None:
    """`function(device)` of a loaded test module in a process of its own; it must come to its end."""
    if device.type == "cpu":
        code, said = _forked(getattr(sys.modules[module], function), device)
    else:  # CUDA does not survive a fork
        program = f"import sys; sys.path[:0] = {sys.path!r}; from {module} import {function}; import torch; "
        program += f"{function}(torch.device('{device.type}'))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
        code, said = done.returncode, done.stderr
    assert code == 0, f"exit {code}\n{said[-2000:]}"


def _forked(function: Callable[[torch.device], None], device: torch.device) -> tuple[int, str]:
    """Exit code and what it wrote to stderr, of a fork: it need not import torch and triton again."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(said.fileno(), 2)
                faulthandler.disable()  # pytest's, which would write past this file
                for place, name in ALLOCATORS:  # unpoisoned: to fill such a tensor would take its memory
                    setattr(place, name, getattr(place, name).__wrapped__)
                function(device)
                code = 0
            except BaseException:
                traceback.print_exc(file=said)
                said.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read()


def zeros(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that, on a CPU, take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=dtype, device=device)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, dtype.itemsize * count, flags=flags), dtype=dtype)


def run_last_programs(module: ModuleType, device: torch.device) -> None:
    """In the interpreter, for the rest of this process: of each launch of `module` (of millions of programs) the last."""
    if device.type != "cpu":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    def launch_last(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
        last = interpreter.TensorHandle(np.array([grid[0] - 1], dtype=np.int32), tl.int32)
        interpreter.InterpreterBuilder.create_get_program_id = lambda self, axis: last
        kernel[(1,)](*args, **meta)

    module.launch = launch_last  # type: ignore[attr-defined]
