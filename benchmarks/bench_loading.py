"""From a dense model on the device to a pruned, packed and ready one: seconds and peak memory.

    python -m benchmarks.bench_loading                        # Llama-2-7B-shaped, bf16, on CUDA
    python -m benchmarks.bench_loading --tiny                 # a small model, on any machine

    masks        sparsify by magnitude: scores, masks, zeros
    packing      the first call: capture, plans, every masked weight into the formats of its
                 kernels, its dense copy freed, and the answer. Plans are measured where neither
                 the shipped table nor the user's cache has them.
    compilation  the calls after it, under Inductor; a later process finds its code in a cache

One token, batch 1. Memory is the peak of the allocator up to the end of the step, beside the memory
of the dense model; on the CPU it is not measured.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch

import resu_compile as resu
from benchmarks.llama import MODELS, build
from benchmarks.results import Result, command_of

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
SPARSITY = 0.7


def measure(name: str, layers: int | None, compiled: bool, command: str) -> Result:
    """Build the dense model, then time what makes it ready."""
    torch.manual_seed(0)
    torch.zeros(1, device=DEVICE)  # the device itself is up
    before = _allocated()
    start = time.perf_counter()
    model = build(name, DEVICE, torch.bfloat16 if CUDA else torch.float32, layers)
    _wait()
    built_s = time.perf_counter() - start
    dense = _allocated() - before
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    print(f"built in {built_s:.1f} s, {dense / 2**30:.2f} GiB", flush=True)

    start = time.perf_counter()
    resu.sparsify(model, SPARSITY, compile=False)
    _wait()
    masks_s = time.perf_counter() - start
    masks_peak = _peak() - before
    print(f"masks {masks_s:.2f} s, peak {masks_peak / 2**30:.2f} GiB", flush=True)

    token = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    start = time.perf_counter()
    control = resu.controller(model)
    control.compile()
    control.release_dense()
    with torch.no_grad():
        logits = model(input_ids=token, use_cache=False).logits
    _wait()
    packing_s = time.perf_counter() - start
    peak, after = _peak() - before, _allocated() - before
    print(f"packing {packing_s:.2f} s, peak {peak / 2**30:.2f} GiB", flush=True)

    compilation_s = call_ms = math.nan
    if compiled:
        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(3):
                logits = model(input_ids=token, use_cache=False).logits
            _wait()
            compilation_s, start = time.perf_counter() - start, time.perf_counter()
            logits = model(input_ids=token, use_cache=False).logits
            _wait()
        call_ms = (time.perf_counter() - start) * 1e3
    if not bool(logits.isfinite().all()):
        raise SystemExit(f"{name}: expected finite logits")
    record = {
        "model": name,
        "layers": layers,
        "masks_s": masks_s,
        "packing_s": packing_s,
        "compilation_s": compilation_s if compiled else None,
        "ready_s": masks_s + packing_s,
        "call_ms": call_ms if compiled else None,
        "dense_bytes": dense,
        "peak_bytes": peak,
        "masks_peak_bytes": masks_peak,
        "after_bytes": after,
    }
    rows = [
        ("masks", f"{masks_s:.2f} s", _share(masks_peak, dense)),
        ("packing", f"{packing_s:.2f} s", _share(peak, dense)),
        ("masks and packing", f"{masks_s + packing_s:.2f} s", _share(peak, dense)),
        ("held after it", "", _share(after, dense)),
    ]
    if compiled:
        rows.append(("compilation", f"{compilation_s:.2f} s", ""))
        rows.append(("a call after that", f"{call_ms:.2f} ms", ""))
    size = "" if layers is None else f", {layers} layers"
    title = f"Loading {name}{size}, {SPARSITY:.0%} pruned by magnitude, {dense / 2**30:.2f} GiB"
    return Result(title, command, ("step", "time", "memory to dense"), rows, [record])


def _allocated() -> int:
    return torch.cuda.memory_allocated() if CUDA else 0


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else 0


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def _share(now: int, dense: int) -> str:
    return f"{now / dense:.3f}x" if dense else "not measured"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama2-7b")
    parser.add_argument("--layers", type=int, help="number of layers, in place of the published")
    parser.add_argument("--no-compilation", action="store_true", help="stop when all is packed")
    parser.add_argument("--tiny", action="store_true", help="two small layers")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    name = "tiny" if args.tiny else args.model
    command = command_of("bench_loading", argv)
    result = measure(name, args.layers, not args.no_compilation, command)
    print(result.text())
    if args.json:
        result.save(args.json)


if __name__ == "__main__":
    main()
