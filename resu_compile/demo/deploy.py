"""After training: time the sparse model beside the dense one, export it, load it elsewhere."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import resu_compile as resu
from resu_compile.demo.tasks import Task
from resu_compile.demo.training import autocast
from resu_compile.errors import ResuCompileError

# Agreement of an exported float32 program with the eager model: the compiled and the sparse
# product sum in another order than the dense one.
RTOL, ATOL = 1e-3, 1e-4


@dataclass(frozen=True)
class ExportCheck:
    """An exported model, and what another process made of it.

    Attributes:
        path: the ``.pt2`` file.
        size_bytes: of the file.
        max_difference: largest absolute difference of an output.
        agrees: whether every output lies within the tolerance.
    """

    path: Path
    size_bytes: int
    max_difference: float
    agrees: bool


def inference_ms(
    task: Task, models: Sequence[nn.Module], *, rounds: int = 40, round_s: float = 0.005
) -> list[float]:
    """Milliseconds of one call of each model on one held-out input.

    The models take turns, and the fastest round of each counts: what else the machine does can
    only add to a time. Compilation happens before the clock starts.
    """
    inputs = task.example()
    times: list[list[float]] = [[] for _ in models]
    for model in models:
        model.eval()
    with torch.inference_mode(), autocast(task):
        calls = []
        for model in models:
            for _ in range(3):
                model(inputs)
            once = _elapsed_s(model, inputs, 3) / 3
            calls.append(max(1, round(round_s / once)))
        for _ in range(rounds):
            for index, model in enumerate(models):
                elapsed = _elapsed_s(model, inputs, calls[index])
                times[index].append(1e3 * elapsed / calls[index])
    for model in models:
        model.train()
    return [min(rounds_ms) for rounds_ms in times]


def _elapsed_s(model: Callable[[Tensor], Tensor], inputs: Tensor, calls: int) -> float:
    on_gpu = inputs.is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(calls):
        model(inputs)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def export_and_check(task: Task, model: nn.Module, path: Path) -> ExportCheck:
    """Export ``model``, load the file in a new Python process and compare the outputs.

    Raises:
        ResuCompileError: the new process failed; the message ends with what it wrote.
    """
    inputs = task.example()
    resu.export(model, (inputs,), path)
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        outputs = model(inputs)
    model.train()
    sample = path.with_suffix(".sample.pt")
    torch.save({"inputs": inputs.cpu(), "outputs": outputs.cpu()}, sample)
    command = [sys.executable, "-m", "resu_compile.demo.check_export"]
    done = subprocess.run(
        [*command, str(path.resolve()), str(sample.resolve()), inputs.device.type],
        capture_output=True,
        text=True,
        cwd=Path(resu.__file__).parents[1],  # the same package there as here
        check=False,
    )
    sample.unlink()
    if done.returncode != 0:
        raise ResuCompileError(f"{path}: loading it in a new process failed: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return ExportCheck(path, path.stat().st_size, found["max_difference"], found["agrees"])
