"""The training loop of the demo: an ordinary PyTorch loop, with a ``Cycle`` beside it.

What a user adds to a loop of his own is all here: a ``Cycle`` before it, and ``cycle.step()`` after
each step of the optimizer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from tqdm import tqdm

import resu_compile as resu
from resu_compile.demo.tasks import Score, Task, batch_loss
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import Cycle
from resu_compile.training.ever_pruned import EverPruned
from resu_compile.training.plan import Plan, build_plan

CURVE_POINTS = 30


@dataclass(frozen=True)
class Method:
    """How a model is pruned, under the names that results and tables show.

    Attributes:
        key: in ``results.json``.
        label: in tables and pictures.
        config: of the run; None trains a plain dense model.
    """

    key: str
    label: str
    config: TrainingConfig | None = None

    @property
    def plan(self) -> Plan:
        """The spans of the run; none if it is plain."""
        return build_plan(self.config) if self.config is not None else ()


@dataclass
class Run:
    """A trained model, and what was seen on the way.

    Attributes:
        method: what was run.
        model: the trained model, compiled.
        score: quality on held-out data at the end.
        curve: (steps done, score on held-out data).
        sparsity: share of pruned entries over all masked weights.
        resurrections: places brought back, summed over the commits; one that came back twice counts
            twice.
        resurrected_share: share of the finally active places that had been pruned before.
        train_s: seconds of training, compilation and scoring included.
    """

    method: Method
    model: nn.Module
    score: Score
    curve: list[tuple[int, Score]] = field(default_factory=list)
    sparsity: float = 0.0
    resurrections: int = 0
    resurrected_share: float = 0.0
    train_s: float = 0.0


def train(task: Task, method: Method, *, seed: int, compiled: bool = True) -> Run:
    """Train a fresh model of ``task`` by the plan of ``method``.

    For one ``seed`` every method starts from the same weights and sees the same batches in the same
    order.

    Args:
        task: data, model and training settings.
        method: what is pruned and resurrected when.
        seed: of the initial weights and of the order of the batches.
        compiled: compile the model; False runs it eagerly.
    """
    started = time.perf_counter()
    settings = task.training
    model = task.build(seed)
    ever_pruned = EverPruned()
    cycle = None
    if method.config is not None:
        config = replace(method.config, seed=seed, compile=compiled)
        cycle = Cycle(
            model, config, on_event=lambda _: ever_pruned.record(resu.controller(model))
        ).start()
    elif compiled:
        model.compile()  # the dense baseline is plain PyTorch
    optimizer = task.optimizer(model)

    run = Run(method, model, Score(0.0, 0.0))
    batches = task.batches(seed + 1)
    score_every = max(1, settings.steps // CURVE_POINTS)
    label = f"{task.name:6s} | {method.label:14s}"
    bar = tqdm(range(settings.steps), desc=label, unit="step", dynamic_ncols=True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        inputs, target = next(batches)
        with autocast(task):
            logits = model(inputs)
        loss = batch_loss(logits, target)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        if step % 10 == 0:  # reading the loss waits for the device
            stage = "dense" if cycle is None else cycle.stage
            bar.set_postfix_str(f"{stage} loss {loss.item():.3f}")
        if (step + 1) % score_every == 0:
            run.curve.append((step + 1, evaluate(task, model, quick=True)))
        if cycle is not None:
            cycle.step()  # prunes, opens a RESU phase or commits, where the plan says so

    if cycle is not None:
        controller = resu.controller(cycle.finish())
        run.sparsity = controller.sparsity
        run.resurrections = sum(
            stats.commit["weights"]["total"]["resurrected"]
            for stats in cycle.history
            if stats.commit
        )
        run.resurrected_share = ever_pruned.came_back(controller)
    run.score = evaluate(task, model)
    run.train_s = time.perf_counter() - started
    return run


def evaluate(task: Task, model: nn.Module, *, quick: bool = False) -> Score:
    """Score on held-out data, eagerly: a score on the way is not worth another compilation."""
    model.eval()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), autocast(task):
        score = task.evaluate(model, quick=quick)
    model.train()
    return score


def autocast(task: Task) -> torch.autocast:
    """The autocast context of ``task``; does nothing where the task trains in float32."""
    device_type = task.example().device.type
    return torch.autocast(device_type, torch.bfloat16, enabled=task.training.autocast)
