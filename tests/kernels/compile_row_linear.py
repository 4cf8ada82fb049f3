"""Compile the Triton kernels of weights packed by rows for an H100 or H200; needs no GPU.

The interpreter runs what the compiler may refuse, and takes the place of ``triton.jit`` in the
process of the tests: ``python -m tests.kernels.compile_row_linear`` prints a line a variant.
"""

from __future__ import annotations

import itertools
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resu_compile.kernels.plan import ACTIVATIONS
from resu_compile.kernels.row_fill import BLOCK, _count_kernel, _fill_kernel
from resu_compile.kernels.row_linear_triton import _row_linear_kernel

HOPPER = GPUTarget("cuda", 90, 32)
LINEAR = {"gap_ptr": "u8", "base_ptr": "i16", "ends_ptr": "i32", "first_ptr": "i32"}
FILL = {"flat_ptr": "i16", "val_ptr": "i16", "gap_ptr": "u8", "base_ptr": "i16"}


def compile_for_hopper(
    kernel: Any, pointers: dict[str, str], others: str, constants: dict[str, int]
) -> str:
    """The target that the PTX names; pointers are aligned, those not named point to ``others``."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{pointers.get(name, others)}" if name.endswith("_ptr") else "i32"
    names = enumerate(kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if name.endswith("_ptr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    ptx = triton.compile(source, target=HOPPER, options={"num_warps": 4}).asm["ptx"]
    found = re.search(r"\.target (sm_\w+)", ptx)
    return found[1] if found else "no target"


def main() -> None:
    for gap_bits, block_m in itertools.product((4, 8), (1, 8)):
        constants = {
            "HAS_BIAS": True,
            "ACTIVATION": ACTIVATIONS.index("gelu_tanh"),
            "GAP_BITS": gap_bits,
            "NARROW": True,
            "VECTOR": 8,
            "BLOCK_G": 8,
            "BLOCK_M": block_m,
        }
        target = compile_for_hopper(_row_linear_kernel, LINEAR, "bf16", constants)
        sys.stdout.write(f"{gap_bits} bits, {block_m} rows: {target}\n")
    widest = {"WIDEST": 255, "BLOCK": BLOCK}
    sys.stdout.write(f"count: {compile_for_hopper(_count_kernel, {}, 'i64', widest)}\n")
    constants = {**widest, "VECTOR": 8, "PASS_BITS": 5}
    sys.stdout.write(f"fill: {compile_for_hopper(_fill_kernel, FILL, 'i64', constants)}\n")


if __name__ == "__main__":
    main()
