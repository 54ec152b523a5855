"""What the fused attention kernel compiles to for an H100 or H200; no GPU is needed.

    python -m benchmark.instructions

By head size, with T5's bias or without, causal or not: the registers of a thread, what of them does
not fit and goes to memory, whether ptxas makes every product wait for the one before, and how many
instructions a warp issues for a block of keys. With a bias there are a loop over keys far before
the queries, one over near ones and one over those far after; the last loop is over the keys that
not every query sees.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.append(str(Path(__file__).parents[1] / "python"))
from sglang.srt.layers.attention.encode_only import triton_kernel
from sglang.srt.layers.attention.encode_only.triton_kernel import BIAS_MARGIN, Blocks, blocks_for

HOPPER = GPUTarget("cuda", 90, 32)
T5_REACH = 91 + BIAS_MARGIN
"""Of a row of T5's biases: those of its 32 buckets are alike from a distance of 91 on."""


class Compiled(NamedTuple):
    """
    Attributes:
        registers: of a thread.
        spilled: bytes of a thread that do not fit into them.
        serialized: whether every product waits for the one before.
        loops: how many instructions each loop with products has, in the order of the code.
    """

    registers: int
    spilled: int
    serialized: bool
    loops: list[int]


def compile_for_hopper(
    head_dim: int, *, with_bias: bool, causal: bool, blocks: Blocks | None = None
) -> Compiled:
    """The kernel for bfloat16 and aligned strides, as encoders have them."""
    kernel: Any = triton_kernel._packed_attention_kernel
    blocks = blocks or blocks_for(head_dim, torch.bfloat16)
    width = triton.next_power_of_2(head_dim)
    constants = {
        "GROUP": 1,
        "QK_DIM": head_dim,
        "V_DIM": head_dim,
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "BLOCK_D": width,
        "BLOCK_V": width,
        "BIAS_REACH": T5_REACH if with_bias else 0,
        "BIAS_NEAR": T5_REACH - BIAS_MARGIN if with_bias else -BIAS_MARGIN,
        "LOGIT_CAP": 0.0,
        "CAUSAL": causal,
        "WINDOW": None,
        "PTX": True,
    }
    if not with_bias:
        constants["bias_ptr"] = None
    types = {"starts_ptr": "*i32", "attend_ptr": "*i32", "bias_ptr": "*fp32", "scale": "fp32"}
    unaligned = {"starts_ptr", "attend_ptr", "sequences", "scale"}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = types.get(name, "*bf16" if name.endswith("_ptr") else "i32")
            if name not in unaligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=HOPPER,
        options={"num_warps": blocks.warps, "num_stages": blocks.stages},
    )
    nvidia = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        said = _output(nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", ptx, "-o", cubin)
        code = _output(nvidia.cuobjdump.path, "-sass", cubin)
    stores, loads, registers = (
        int(re.search(pattern, said)[1])  # type: ignore[index]
        for pattern in (r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) reg")
    )
    return Compiled(registers, stores + loads, "serialized" in said, _loops(code))


def _output(*command: str | Path) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def _loops(code: str) -> list[int]:
    """The lengths of the loops of `cuobjdump -sass` that multiply."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", code)
    instructions = {int(address, 16): text for address, text in lines}
    lengths = []
    for last, text in instructions.items():
        target = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < last:
            body = [t for at, t in instructions.items() if int(target[1], 16) <= at <= last]
            if any("HGMMA" in t for t in body):
                lengths.append(len(body))
    return lengths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--blocks", type=Blocks.of, help="QUERIES,KEYS,WARPS,STAGES")
    args = parser.parse_args()
    print(f"Triton {triton.__version__}\n")
    heading = ["head size", "bias", "causal", "block", "registers", "spilled, bytes"]
    heading += ["products", "instructions of the loops"]
    print("|", " | ".join(heading), "|")
    print("|" + "---|" * len(heading))
    for head_dim, bias, causal in itertools.product(args.head_dims, (True, False), (False, True)):
        blocks = args.blocks or blocks_for(head_dim, torch.bfloat16)
        found = compile_for_hopper(head_dim, with_bias=bias, causal=causal, blocks=blocks)
        cells = [head_dim, *("yes" if x else "no" for x in (bias, causal))]
        cells += [f"{blocks.queries} × {blocks.keys}", found.registers, found.spilled]
        cells += ["one by one" if found.serialized else "overlap", ", ".join(map(str, found.loops))]
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    main()
