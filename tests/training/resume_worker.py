"""Kill a training run at random moments and resume it, until it is done.

    python resume_worker.py FOLDER KILLS SEED

Run as a process of its own: it forks, which nobody with threads should do, and PyTorch is imported
once for all runs. Prints a JSON object about what happened; ``test_resume.py`` judges it.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from resu_compile.config import ResurrectionConfig
from resu_compile.training import CheckpointConfig, CycleShares, Trainer, TrainingConfig
from resu_compile.training.callbacks import Callback
from resu_compile.training.checkpoint import latest_checkpoint, load_checkpoint
from resu_compile.training.plan import Stage, build_plan

STEPS = 90
EVERY = 4
BATCHES_PER_EPOCH = 7
STEP_SECONDS = 0.002  # so that a kill can fall into any part of the run


def make_config(folder: Path) -> TrainingConfig:
    """All stages, several cycles, and nothing that is the same after a checkpoint by chance."""
    return TrainingConfig(
        steps=STEPS,
        warmup=0.1,
        recovery=0.2,
        cycles=3,
        cycle=CycleShares(),
        sparsity=0.8,
        resurrection=ResurrectionConfig(init="normal"),  # draws from the controller's generator
        budget_start=0.3,
        budget_end=0.1,
        accumulate=2,
        clip_norm=1.0,
        evaluate_every=10,
        log_every=1,
        checkpoint=CheckpointConfig(str(folder / "checkpoints"), every=EVERY, keep=2),
        stats=str(folder / "stats.jsonl"),
        compile=False,
    )


def make_batches(epoch: int):
    """Batches that draw from every generator there is."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(BATCHES_PER_EPOCH):
        inputs = torch.randn(8, 6, generator=generator) + 0.1 * torch.randn(8, 6)
        inputs = inputs + random.random() + np.random.rand()
        yield inputs, inputs.sin().sum(-1, keepdim=True)


def loss_fn(model, batch):
    time.sleep(STEP_SECONDS)
    inputs, targets = batch
    return F.mse_loss(model(inputs), targets)


def evaluate(model):
    with torch.no_grad():
        inputs, targets = next(make_batches(10**6))  # draws as well, which is to go on as before
        return {"loss": F.mse_loss(model(inputs), targets).item()}


class Progress(Callback):
    """Where a run began and where it is, for a process that watches it; -1 before the start."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 16)
        self.reset()

    def reset(self) -> None:
        struct.pack_into("qq", self._shared, 0, -1, -1)

    @property
    def began(self) -> int:
        return struct.unpack_from("qq", self._shared)[0]

    @property
    def done(self) -> int:
        return struct.unpack_from("qq", self._shared)[1]

    def on_start(self, trainer) -> None:
        step = trainer.cycle.step_index
        struct.pack_into("qq", self._shared, 0, step, step)

    def on_step(self, trainer, loss) -> None:  # noqa: ARG002
        struct.pack_into("q", self._shared, 8, trainer.cycle.step_index + 1)


def train(folder: Path, progress: Progress) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    trainer = Trainer(
        model,
        optimizer,
        loss_fn,
        make_config(folder),
        callbacks=(progress,),
        evaluate=evaluate,
        scheduler=scheduler,
    )
    trainer.fit(make_batches, resume=True)


def fork(folder: Path, progress: Progress) -> int:
    """Train in a child; the exit status of the child tells whether it failed."""
    progress.reset()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(folder, progress)
        status = 0
    except BaseException:  # noqa: BLE001  (the parent must not run on in a child)
        traceback.print_exc()
    finally:
        os._exit(status)


def newest_step(folder: Path) -> int:
    path = latest_checkpoint(folder / "checkpoints")
    return 0 if path is None else load_checkpoint(path)["trainer"]["step"]


def choose_step(folder: Path, newest: int, chance: random.Random) -> int:
    """The step at which to kill next; every other time in a RESU stage, if one is to come."""
    ahead = [span for span in build_plan(make_config(folder)) if span.stage is Stage.RESU]
    ahead = [span for span in ahead if span.stop > newest + 1]
    if ahead and chance.random() < 0.5:
        return chance.randrange(max(ahead[0].start, newest), ahead[0].stop)
    return newest + chance.randrange(3 * EVERY)


def live(folder: Path, last: int | None, chance: random.Random, progress: Progress):
    """One life of a run, killed at step ``last``, or left alone if that is None.

    Returns:
        The step at which it began and the one at which it was killed (None if it got to its end),
        and the newest checkpoint's before it began.
    """
    newest = newest_step(folder)
    child = fork(folder, progress)
    ended, status = 0, 0
    if last is not None:
        while progress.done < last and not ended:
            time.sleep(0.001)
            ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(chance.uniform(0.0, 0.01))  # anywhere in the step, or while it is saved
            os.kill(child, signal.SIGKILL)
    if not ended:
        _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(1)
    killed = None if os.WIFEXITED(status) else progress.done
    return {"newest": newest, "began": progress.began, "killed": killed}


def main() -> None:
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    chance, progress = random.Random(seed), Progress()
    train(folder / "whole", progress)  # in this process: what it imports, every child has
    runs = []
    while kills > 0:
        name, lives = f"killed{len(runs)}", []
        while not lives or lives[-1]["killed"] is not None:
            newest = newest_step(folder / name)
            last = choose_step(folder / name, newest, chance) if kills > 0 else None
            lives.append(live(folder / name, last, chance, progress))
            kills -= lives[-1]["killed"] is not None
        runs.append({"name": name, "lives": lives})
    sys.stdout.write(json.dumps(runs))


if __name__ == "__main__":
    main()
