"""Greedy decoding of Llama-shaped models: tokens a second and weight bytes, sparse and dense.

    python -m benchmarks.bench_decode --model llama3-8b --batch 1 4 16 --sparsity 0.5 0.7 0.9
    python -m benchmarks.bench_decode --tiny                  # a small model, on any machine

transformers' own classes with random weights and a static cache that holds 512 tokens already; one
token of each sequence at a time. Both sides are compiled with ``mode="reduce-overhead"``; the
sparse one by ``sparsify(..., release_dense=True)``. A step is the model's call and the argmax, as a
user's loop has them. Sparse and dense logits are compared before anything is timed.

Two shares of weight bytes: of the masked weights alone, and of all weights, embedding and output
layer included. ``lm_head`` is dense by default; ``--head`` prunes it too, where it is not tied.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch._inductor.config
from torch import Tensor, nn

import resu_compile as resu
from benchmarks.llama import MODELS, Decoder, build
from benchmarks.results import Result, command_of
from resu_compile.config import DEFAULT_EXCLUDE
from resu_compile.runtime.controller import find_controller

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
ROUNDS = 5  # the median of them counts
WARM = 8
CHECKED = 5  # steps that are compared: CUDA graphs run from the third on
# The dense model, compiled against eager: 0.03 and 0.04 with 8 and 16 layers of Llama-3-8B's shape
# (bf16, one H200), from sums in other orders alone. A wrong weight gives about 1.
TOLERANCE = 0.15 if CUDA else 1e-5


@dataclass(frozen=True)
class Case:
    """One compiled model.

    Attributes:
        model: one of ``MODELS``.
        batch: sequences.
        sparsity: of the masked weights; None is the dense model under ``torch.compile``.
        head: prune the output layer too.
        layers: number of layers; None takes the published one.
        prompt: tokens in the cache before the first step.
        steps: tokens a round.
        threshold: ``sparse_threshold`` of ``sparsify``.
        pdl: let the kernels that Inductor makes start before the one before has ended, and tell the
            one behind to do so (its setting ``triton.enable_pdl``; Hopper).
    """

    model: str
    batch: int
    sparsity: float | None
    head: bool = False
    layers: int | None = None
    prompt: int = 512
    steps: int = 64
    threshold: float | str = "auto"
    pdl: bool = False


@dataclass(frozen=True)
class Measured:
    """What one case gave.

    Attributes:
        tokens_per_s: over all sequences.
        step_ms: one token of each sequence, median over rounds.
        host_ms: of it, until the host has launched all; near ``step_ms``, the host is the limit.
        masked_bytes: what the masked weights take now, in all formats.
        masked_dense_bytes: what they take dense.
        all_bytes: what all weights take now.
        all_dense_bytes: what all take dense.
        error: ``|logits - reference| / |reference|``, the reference being the eager model.
        ready_s: from the pruned model to the end of the steps that are compared.
    """

    tokens_per_s: float
    step_ms: float
    host_ms: float
    masked_bytes: int
    masked_dense_bytes: int
    all_bytes: int
    all_dense_bytes: int
    error: float
    ready_s: float


@dataclass(frozen=True)
class Prepared:
    """A compiled model that is checked and may be timed.

    Attributes:
        case: what it is.
        decoder: its next step is one of those that count.
        all_dense_bytes: what all its weights take dense.
        masked_dense_bytes: of them the masked ones.
        error: as in ``Measured``.
        ready_s: as in ``Measured``.
    """

    case: Case
    decoder: Decoder
    all_dense_bytes: int
    masked_dense_bytes: int
    error: float
    ready_s: float

    def time(self) -> Measured:
        """Time its steps."""
        step_s, host_s = _time_steps(self.decoder, self.case.steps)
        all_bytes = size_bytes(self.decoder.model)
        return Measured(
            tokens_per_s=self.case.batch / step_s,
            step_ms=step_s * 1e3,
            host_ms=host_s * 1e3,
            masked_bytes=all_bytes - (self.all_dense_bytes - self.masked_dense_bytes),
            masked_dense_bytes=self.masked_dense_bytes,
            all_bytes=all_bytes,
            all_dense_bytes=self.all_dense_bytes,
            error=self.error,
            ready_s=self.ready_s,
        )


def measure(case: Case) -> Measured:
    """Build, compile, check and time one case."""
    return prepare(case).time()


def prepare(case: Case, further_steps: int = 0) -> Prepared:
    """Build, compile and check one case.

    Args:
        case: what to build.
        further_steps: steps that have room in the cache beside those that are timed.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    mode = "reduce-overhead" if CUDA else None
    model = build(case.model, DEVICE, torch.bfloat16 if CUDA else torch.float32, case.layers)
    all_dense, masked_dense = size_bytes(model), 0
    if case.sparsity is not None:
        resu.sparsify(
            model,
            case.sparsity,
            exclude=None if case.head else DEFAULT_EXCLUDE,
            sparse_threshold=case.threshold,
            mode=mode,
            compile=False,
        )
        weights = resu.controller(model).weights.values()
        masked_dense = sum(weight.numel * weight.parameter.itemsize for weight in weights)
    room = case.prompt + CHECKED + WARM + case.steps * ROUNDS + further_steps
    ids = torch.randint(model.config.vocab_size, (case.batch, case.prompt), device=DEVICE)
    expected, tokens = _run(Decoder(model, ids, room))  # eager
    decoder = Decoder(model, ids, room)
    start = time.perf_counter()
    if case.sparsity is None:
        model.compile(mode=mode)
    else:
        control = resu.controller(model)
        control.compile()
        control.release_dense()
    with torch._inductor.config.patch({"triton.enable_pdl": True} if case.pdl else {}):
        got, _ = _run(decoder, tokens)
    ready = time.perf_counter() - start
    # the first call packs, the second compiles, the third records: the last is what is timed
    error = float((got - expected).norm() / expected.norm())
    return Prepared(case, decoder, all_dense, masked_dense, error, ready)


def _run(decoder: Decoder, tokens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits of the last of a few steps, in fp32, and the tokens that were fed, or are to be."""
    fed = []
    for step in range(CHECKED):
        if tokens is not None:
            decoder.token = tokens[step]
        fed.append(decoder.token)
        logits = decoder.step()
    _wait()
    return logits.float(), torch.stack(fed)


def _time_steps(decoder: Decoder, steps: int) -> tuple[float, float]:
    """Seconds a step, and of these how many the host takes to launch it."""
    times = []
    for count in [WARM] + [steps] * ROUNDS:
        _wait()
        start = time.perf_counter()
        for _ in range(count):
            decoder.step()
        launched = time.perf_counter() - start
        _wait()
        times.append(((time.perf_counter() - start) / count, launched / count))
    return sorted(times[1:])[ROUNDS // 2]


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def size_bytes(model: nn.Module) -> int:
    """Bytes of all weights as they are stored now: dense storages, and formats of the kernels."""
    dense = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    control = find_controller(model)
    released = None if control is None else control.released
    return sum(dense.values()) + (0 if released is None else released.packed_bytes)


# -- the table -------------------------------------------------------------------------------
def table(cases: list[Case], command: str) -> Result:
    """Measure every case; the dense one of a batch comes first and is what the others are to."""
    found: dict[Case, Measured] = {}
    for case in cases:
        found[case] = measure(case)
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
        print(*to_result(found, command).rows[-1], sep="  ", flush=True)
        check(case, found[case])
    return to_result(found, command)


def check(case: Case, found: Measured) -> None:
    """End the run where the logits are not those of the eager model."""
    if not found.error < TOLERANCE:
        raise SystemExit(f"{case}: logits are off by {found.error:.3g}, over {TOLERANCE}")


def to_result(found: Mapping[Case, Measured], command: str) -> Result:
    """The table of what was measured, in its order, each case to the dense one of its batch."""
    rows, records = [], []
    dense = {_group(case): own for case, own in found.items() if case.sparsity is None}
    for case, own in found.items():
        base = dense.get(_group(case))
        faster = None if base is None else own.tokens_per_s / base.tokens_per_s
        rows.append(
            (
                _label(case),
                case.batch,
                "dense" if case.sparsity is None else f"{case.sparsity:.0%}",
                f"{own.tokens_per_s:.0f}",
                f"{own.step_ms:.3f}",
                f"{own.host_ms:.3f}",
                "" if faster is None else f"{faster:.2f}x",
                _share(own.masked_bytes, own.masked_dense_bytes),
                _share(own.all_bytes, own.all_dense_bytes),
                f"{own.error:.1e}",
                f"{own.ready_s:.0f}",
            )
        )
        records.append({**asdict(case), **asdict(own), "speedup": faster})
    headers = ("model", "batch", "sparsity", "tokens/s", "ms a step", "host ms", "to dense")
    headers += ("masked weights", "all weights", "error", "ready s")
    prompt = next(iter(found)).prompt
    title = f"Greedy decoding at position {prompt}, {'bf16' if CUDA else 'fp32'}"
    return Result(title, command, headers, rows, records)


def _group(case: Case) -> tuple[object, ...]:
    """What is alike in a case and the dense one that it is compared with."""
    return case.model, case.batch, case.layers, case.prompt, case.pdl


def _label(case: Case) -> str:
    layers = "" if case.layers is None else f", {case.layers} layers"
    head = ", head pruned" if case.head and case.sparsity else ""
    return f"{case.model}{layers}{head}{', PDL' if case.pdl else ''}"


def _share(now: int, before: int) -> str:
    return f"{now / before:.2f}x of {before / 2**20:.0f} MiB" if before else ""


def cases_of(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line asks for, the dense one of each batch first."""
    return [
        Case(
            args.model,
            batch,
            sparsity,
            args.head,
            args.layers,
            args.prompt,
            args.steps,
            args.threshold if args.threshold == "auto" else float(args.threshold),
            args.pdl,
        )
        for batch in args.batch
        for sparsity in (*(() if args.no_dense else (None,)), *args.sparsity)
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, default="llama3-8b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument("--head", action="store_true", help="prune the output layer too")
    parser.add_argument("--layers", type=int, help="number of layers, in place of the published")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense model out")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=64, help="tokens a round")
    parser.add_argument("--threshold", default="auto", help="sparse_threshold of sparsify")
    parser.add_argument("--pdl", action="store_true", help="Inductor's triton.enable_pdl, for both")
    parser.add_argument("--tiny", action="store_true", help="two small layers, one batch")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args(argv)
    if args.tiny:
        tiny = {"model": "tiny", "batch": [2], "sparsity": [0.7], "prompt": 16, "steps": 2}
        vars(args).update(tiny)
    result = table(cases_of(args), command_of("bench_decode", argv))
    print(result.text())
    if args.json:
        result.save(args.json)


if __name__ == "__main__":
    main()
