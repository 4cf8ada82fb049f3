"""A masked training step against the dense compiled step of the same GPT.

    python -m pytest benchmarks/bench_train_step.py          # one group a model
    python -m benchmarks.bench_train_step --table            # ratios in the same run, peak memory
    python -m benchmarks.bench_train_step --table --only dense resu

Forward, backward and fused AdamW, under ``torch.compile``; on CUDA under bf16 autocast. "dense" is
plain ``torch.compile``, "sparse" the SPARSE phase at 70 %, "resu" a resurrection by default, in
which AdamW trains theta and the active weights alike; the others give theta a step of its own,
beside active weights that train or are frozen. "resu of TrainingConfig" is the phase as its default
runs it: hidden theta, and E[g^2] kept. "resu.optim" steps them by
``resu_compile.optim.AdamW``, "packed" with moments for the active places only; the rest by torch's.
Steps of all take turns, in an order drawn anew for each round.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import resu_compile as resu
from benchmarks import harness
from benchmarks.harness import CUDA, DEVICE, Entry, Group
from benchmarks.results import Result
from resu_compile.errors import NotSparsifiedError
from resu_compile.training.config import TRIAL

COMMAND = "python -m benchmarks.bench_train_step"
SPARSITY = 0.7
FROZEN = {"lr": 1e-3, "freeze_active": True}
RESURRECTIONS = {
    "resu": {},
    "resu of TrainingConfig": TRIAL,
    "resu adam": {"lr": 1e-3},
    "resu adam, resu.optim": {"lr": 1e-3},
    "resu adam frozen": FROZEN,
    "resu adam frozen, resu.optim": FROZEN,
    "resu selective, resu.optim": {"lr": 1e-3, "rule": "selective"},
    "resu selective frozen, resu.optim": {**FROZEN, "rule": "selective"},
}
GROUP_IMPLS = ("dense", "sparse", "resu", "resu adam, resu.optim")
IMPLS = ("dense", "sparse", "sparse packed, resu.optim", *RESURRECTIONS)


@dataclass(frozen=True)
class Size:
    """One GPT and its batch."""

    name: str
    layers: int
    width: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    repeats: int
    steps: int


# https://huggingface.co/openai-community/gpt2: 12 layers of 768; the second has the width and the
# batch at which weights outweigh activations
SIZES = (
    (
        Size("GPT 124M, 32x1024 tokens", 12, 768, 12, 50304, 32, 1024, repeats=11, steps=4),
        Size("GPT 0.4B, 8x1024 tokens", 8, 2048, 16, 50304, 8, 1024, repeats=11, steps=4),
    )
    if CUDA
    else (Size("GPT 0.9M, 4x64 tokens", 4, 128, 4, 512, 4, 64, repeats=10, steps=4),)
)
SMALLEST = Size("GPT, 1 layer of 32", 1, 32, 2, 64, 2, 16, repeats=3, steps=1)


# -- the model -------------------------------------------------------------------------------
class Block(nn.Module):
    """Attention and MLP of GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.attention_in(self.norm1(x)).view(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2 with its loss; the output layer is tied to the embedding, which stays dense."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.tokens, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position.weight
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embedding.weight.t()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def step_of(
    size: Size, impl: str, start: nn.Module
) -> tuple[Callable[[], Tensor], nn.Module, torch.optim.Optimizer]:
    """A training step of a copy of ``start``, warm; the copy; its optimizer."""
    model = copy.deepcopy(start)
    if impl == "dense":
        model.compile()
    else:
        resu.sparsify(model, SPARSITY, sparse_threshold=1.0)
        if impl in RESURRECTIONS:
            settings = RESURRECTIONS[impl]
            if settings.get("score") == "saliency":
                resu.controller(model).track_gradients()
            resu.controller(model).resurrect(**settings).__enter__()
    options = {"lr": 1e-4, "weight_decay": 0.1, "fused": True}
    if "packed" in impl:
        optimizer = resu.optim.AdamW(model.parameters(), state="active", **options)
    elif "resu.optim" in impl:
        optimizer = resu.optim.AdamW(model.parameters(), **options)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **options)
    ids = torch.randint(size.vocabulary, (size.batch, size.tokens), device=DEVICE)

    def step() -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=CUDA):
            loss = model(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for _ in range(3):
        loss = step()
    assert math.isfinite(loss.item())
    return step, model, optimizer


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(step: Callable[[], Tensor], count: int) -> float:
    """Mean time of a step."""
    synchronize()
    started = time.perf_counter()
    for _ in range(count):
        step()
    synchronize()
    return (time.perf_counter() - started) / count * 1e3


# -- groups ----------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def started(size: Size) -> nn.Module:
    torch.manual_seed(0)
    return Gpt(size).to(DEVICE)


def build_steps(size: Size, impls: tuple[str, ...]) -> dict[str, Entry]:
    start = started(size)
    return {impl: Entry((step_of(size, impl, start)[0],)) for impl in impls}


def groups(*, smallest: bool = False) -> list[Group]:
    """The groups of the suite; ``smallest``: one tiny model, dense and sparse."""
    sizes = (SMALLEST,) if smallest else SIZES[:1]
    impls = GROUP_IMPLS[:2] if smallest else GROUP_IMPLS
    return [
        Group(
            f"training step, {size.name}",
            impls,
            ("dense",),
            functools.partial(build_steps, size, impls),
            graph=False,
        )
        for size in sizes
    ]


@pytest.mark.parametrize(("group", "impl"), harness.each_impl(groups()), ids=harness.show)
def test_train_step(benchmark, group, impl):
    harness.run_benchmark(benchmark, group, impl)


# -- one table -------------------------------------------------------------------------------
def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    states = optimizer.state.values()
    return sum(value.nbytes for state in states for value in state.values())


def peak_bytes(step: Callable[[], Tensor], model: nn.Module, optimizer: torch.optim.Optimizer):
    """Most memory in use at a time in a step: weights, masks, optimizer state and the rest."""
    kept = sum(parameter.nbytes for parameter in model.parameters()) + state_bytes(optimizer)
    with contextlib.suppress(NotSparsifiedError):
        control = resu.controller(model)
        kept += sum(weight.bits.nbytes for weight in control.weights.values())
        if control.moments is not None:
            kept += 4 * sum(weight.numel for weight in control.weights.values())
        if control.resurrection is not None and control.resurrection.hidden is not None:
            kept += sum(weight.parameter.nbytes for weight in control.weights.values())
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()  # other models are among it
    step()
    return kept + torch.cuda.max_memory_allocated() - before


def table_rows(size: Size, impls: Sequence[str]) -> list[list[object]]:
    start = started(size)
    steps: dict[str, Callable[[], Tensor]] = {}
    memory: dict[str, float] = {}
    moments: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for impl in impls:
        at = time.perf_counter()
        steps[impl], model, optimizer = step_of(size, impl, start)
        seconds[impl] = time.perf_counter() - at
        moments[impl] = state_bytes(optimizer)
        if CUDA:
            memory[impl] = peak_bytes(steps[impl], model, optimizer) / 2**30
    gc.collect()
    gc.disable()  # a collection of the compilers' graphs takes longer than a step
    samples: dict[str, list[float]] = {impl: [] for impl in impls}
    shuffle = random.Random(0).shuffle
    for _ in range(size.repeats):
        order = list(impls)
        shuffle(order)  # a drift of the clocks, or what ran before, meets all alike
        for impl in order:
            samples[impl].append(milliseconds(steps[impl], size.steps))
    gc.enable()
    pick = statistics.median if CUDA else min  # on a shared CPU other programs only add time
    best = {impl: pick(own) for impl, own in samples.items()}
    rows: list[list[object]] = []
    for impl in impls:
        spread = (max(samples[impl]) - min(samples[impl])) / best[impl]
        row = [size.name if impl == "dense" else "", impl, f"{best[impl]:.2f}"]
        row += [f"{best[impl] / best['dense']:.3f}", f"{spread:.1%}"]
        row += [f"{memory[impl]:.2f}" if CUDA else None]
        row += [f"{moments[impl] / moments['dense']:.2f}", f"{seconds[impl]:.0f}"]
        rows.append(row)
    return rows


def make_table(impls: Sequence[str]) -> Result:
    rows: list[list[object]] = []
    with harness.one_thread():
        for size in SIZES:
            rows += table_rows(size, impls)
            started.cache_clear()
            torch._dynamo.reset()
            gc.collect()
    head = ["model", "step", "ms", "of dense", "spread", "peak GiB", "state", "to compile, s"]
    return Result(f"Training steps, {SPARSITY:.0%} pruned", f"{COMMAND} --table", head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="print one table")
    parser.add_argument("--only", nargs="+", choices=IMPLS, default=IMPLS, help="steps to time")
    parser.add_argument("--json", metavar="PATH", help="write the table there as well")
    args = parser.parse_args()
    if not args.table:
        parser.error("expected --table")
    if "dense" not in args.only:
        parser.error("expected dense among --only: the others are shown against it")
    began = time.perf_counter()
    result = make_table(args.only)
    print(result.text())
    if args.json:
        result.save(args.json)
    print(f"took {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
