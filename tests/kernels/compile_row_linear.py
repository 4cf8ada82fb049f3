"""Compile the portable row kernel for an H100 or H200; needs no GPU.

The interpreter runs what the compiler may refuse, and takes the place of ``triton.jit`` in the
process of the tests: ``python -m tests.kernels.compile_row_linear`` prints a line a variant.
"""

from __future__ import annotations

import itertools
import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resu_compile.kernels.plan import ACTIVATIONS
from resu_compile.kernels.row_linear_triton import _row_linear_kernel

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {"gap_ptr": "u8", "base_ptr": "i16", "ends_ptr": "i32", "first_ptr": "i32"}


def ptx_of(constants: dict[str, int]) -> str:
    """PTX for bf16, with aligned pointers."""
    signature = {}
    for name in _row_linear_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{POINTERS.get(name, 'bf16')}" if name.endswith("_ptr") else "i32"
    names = enumerate(_row_linear_kernel.arg_names)
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in names if name.endswith("_ptr")}
    source = ASTSource(
        fn=_row_linear_kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    return triton.compile(source, target=HOPPER, options={"num_warps": 4}).asm["ptx"]


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
        found = re.search(r"\.target (sm_\w+)", ptx_of(constants))
        sys.stdout.write(f"{gap_bits} bits, {block_m} rows: {found and found[1]}\n")


if __name__ == "__main__":
    main()
