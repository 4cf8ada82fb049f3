"""A 12-layer GPT on the source of Python's standard library, in a loop of one's own.

    pip install resu-compile[train]
    python examples/gpt12.py --device cuda --method gmp --sparsity 0.8

The loop is an ordinary one; the sparse training is the three lines with ``run``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from resu_compile.experiments import make_task
from resu_compile.experiments.tasks import text
from resu_compile.training import SparseTraining, TrainingConfig
from resu_compile.training.batches import BatchStream

GPT12 = text.GPTSize(768, 12, 12, 512, 16, 6e-4, eval_batches=40, autocast="bfloat16")
TINY = text.GPTSize(24, 12, 2, 16, 2, 3e-3, eval_batches=2)  # 12 layers as well, for a CPU


def main(arguments: Sequence[str] | None = None) -> nn.Module:
    """Train, and return the sparse model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--method", default="resu")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--tiny", action="store_true", help="width 24, to see it run")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args(arguments)

    text.SIZES["gpt12"] = TINY if options.tiny else GPT12
    task = make_task(
        "bytes", steps=options.steps, seed=0, size="gpt12", device=options.device
    )  # data, model, AdamW and a cosine
    config = TrainingConfig(
        method=options.method,
        steps=options.steps,
        sparsity=options.sparsity,
        compile=not options.eager,
    )
    run = SparseTraining(task.model, config).start()
    batches = BatchStream(task.batches)
    mixed = torch.autocast(
        options.device.partition(":")[0], torch.bfloat16, enabled=task.autocast is not None
    )
    while not run.done:
        with mixed:
            loss = task.loss_fn(task.model, batches.next())
        loss.backward()
        if run.after_backward():  # False where an update takes the place of the step
            nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        task.optimizer.step()
        task.optimizer.zero_grad()
        task.scheduler.step()
        run.after_step()
        if run.step % max(1, options.steps // 20) == 0:
            print(
                f"step {run.step:6d}  loss {loss.item():.4f}  {run.controller.sparsity:.1%} pruned"
            )
    model = run.finish().eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), mixed:
        bits = task.test(model)["bits per byte"]
    stats = run.stats()
    print(f"{options.method} at {stats.sparsity:.1%}: {bits:.4f} bits per byte of unseen files")
    print(f"training FLOPs {stats.training_flops:.2f} of dense training, Rs {stats.ever_share:.3f}")
    return model


if __name__ == "__main__":
    main()
