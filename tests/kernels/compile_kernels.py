"""Compile the kernels of the optimizers' step for an H100 or H200; needs no GPU.

The interpreter runs what the compiler may refuse. It takes the place of ``triton.jit`` in the
process of the tests, so this runs in another: ``python -m tests.kernels.compile_kernels`` prints a
line a kernel, and whether its PTX moves 16 bytes at a time.
"""

from __future__ import annotations

import re
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resu_compile.kernels import bit_rank, fused_update

HOPPER = GPUTarget("cuda", 90, 32)
BYTES = {"bits_ptr", "chosen_ptr"}
NONE, ADAM, SGD = 0, 1, 2
FLAGS = ("A_MOMENTUM", "T_MOMENTUM", "NESTEROV", "CHOSEN")
VARIANTS = {
    "adam, adam": (ADAM, ADAM, ()),
    "adam, momentum of a subset": (ADAM, SGD, ("T_MOMENTUM", "CHOSEN")),
    "nesterov, adam": (SGD, ADAM, ("A_MOMENTUM", "NESTEROV")),
    "frozen, sgd": (NONE, SGD, ()),
    "adam alone": (ADAM, NONE, ()),
}


def ptx_of(kernel, dtype, constants):
    """PTX of ``kernel`` for pointers and a length that are multiples of 16."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            pointee = "u8" if name in BYTES else "i32" if name == "ranks_ptr" else dtype
            signature[name] = f"*{pointee}"
        else:
            signature[name] = "i32" if name == "numel" else "fp32"
    aligned = [["tt.divisibility", 16]]
    names = enumerate(kernel.arg_names)
    attributes = {(i,): aligned for i, name in names if name.endswith("_ptr") or name == "numel"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=HOPPER).asm["ptx"]


def main() -> None:
    for dtype in ("fp32", "bf16"):
        for name, (active, theta, flags) in VARIANTS.items():
            constants = {flag: flag in flags for flag in FLAGS}
            constants |= {"ACTIVE": active, "THETA": theta, "BLOCK": fused_update.BLOCK}
            ptx = ptx_of(fused_update._fused_update_kernel, dtype, constants)
            wide = bool(re.search(r"ld\.global\.v4", ptx) and re.search(r"st\.global\.v4", ptx))
            sys.stdout.write(f"fused {dtype} {name}: {'wide' if wide else 'narrow'}\n")
        ptx_of(fused_update._packed_adam_kernel, dtype, {"BLOCK": bit_rank.BLOCK})
        for kernel in (bit_rank._gather_kernel, bit_rank._scatter_kernel):
            ptx_of(kernel, dtype, {"KEEP": False, "BLOCK": bit_rank.BLOCK})
        sys.stdout.write(f"packed, gather, scatter {dtype}: compiled\n")


if __name__ == "__main__":
    main()
