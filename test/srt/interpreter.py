"""Triton's kernels on a GPU where there is one, else on a CPU by Triton's interpreter.

That has to be chosen before triton is imported, and leaves traces; so what runs a kernel, the
functions named `check_…`, does so in a process of its own.
"""

from __future__ import annotations

import ast
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.runtime_context import get_parallel

from device import DEVICE


def teach_bfloat16() -> None:
    """numpy has no bfloat16: triton's interpreter multiplies its bits, and cuts where it should
    round. torch can do both."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values, source, target, rounding):
        if {source, target} != {tl.bfloat16, tl.float32}:
            return convert(values, source, target, rounding)
        # The bits of bfloat16 are uint16 there.
        if source == tl.bfloat16:
            return (values.astype(np.uint32) << 16).view(np.float32)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)

    def create_dot(self, a, b, *others):
        a, b = (
            self.create_fp_to_fp(x, tl.float32, None) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, *others)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def start_interpreting() -> None:
    from triton import knobs

    assert knobs.runtime.interpret
    torch.set_num_threads(1)
    teach_bfloat16()


def on_one_rank(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with get_parallel().override(tp_size=1, tp_rank=0):
        return function(*args, **kwargs)


@pytest.fixture(scope="module")
def run_kernels() -> Iterator[Callable[..., Any]]:
    """Calls a function of a test module where kernels run."""
    if DEVICE.type == "cuda":
        yield on_one_rank
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        # Blocks are too small to be worth a second thread.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("OPENBLAS_NUM_THREADS", "1")
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), start_interpreting)
        pool.submit(os.getpid).result()
    with pool:
        yield lambda *call, **options: pool.submit(on_one_rank, *call, **options).result()


def imported_by(module: ModuleType) -> set[str]:
    """The packages that a module's code imports."""
    names = set()
    for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names}
