"""The training loop of the demo: an ordinary PyTorch loop that walks through a plan.

What a user adds to a loop of his own is all here: ``sparsify`` before it, ``controller.prune``
where the weights are to be pruned again, and ``with controller.resurrect(...)`` around the steps of
a RESU phase.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

import resu_compile as resu
from resu_compile.demo.schedule import Plan, Span
from resu_compile.demo.tasks import Score, Task, batch_loss
from resu_compile.phase import Phase
from resu_compile.runtime.controller import Controller

CURVE_POINTS = 30


@dataclass(frozen=True)
class Method:
    """A plan, under the names that results and tables show."""

    key: str
    label: str
    plan: Plan


class MaskHistory:
    """Who was ever pruned, and who came back."""

    def __init__(self) -> None:
        self.resurrections = 0
        self._ever_pruned: dict[str, Tensor] = {}

    def observe(self, controller: Controller) -> None:
        """Take note of the masks; to be called after each change of them."""
        for name, mask in controller.masks.items():
            before = self._ever_pruned.get(name)
            self._ever_pruned[name] = ~mask if before is None else before | ~mask

    def resurrected_share(self, controller: Controller) -> float:
        """Share of the places active now that had been pruned before, in [0, 1]."""
        masks = controller.masks
        active = sum(int(mask.sum()) for mask in masks.values())
        back = sum(int((masks[name] & was).sum()) for name, was in self._ever_pruned.items())
        return back / active


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


def train(task: Task, method: Method, *, seed: int, budget: float, compiled: bool = True) -> Run:
    """Train a fresh model of ``task`` by the plan of ``method``.

    For one ``seed`` every method starts from the same weights and sees the same batches in the same
    order.

    Args:
        task: data, model and training settings.
        method: which phase runs when.
        seed: of the initial weights and of the order of the batches.
        budget: share of the kept places that each commit reserves for the resurrected, in [0, 1].
        compiled: compile the model; False runs it eagerly.
    """
    started = time.perf_counter()
    settings = task.training
    model = task.build(seed)
    controller = None
    if any(span.phase is not Phase.DENSE for span in method.plan):
        resu.sparsify(model, sparsity=0.0, compile=compiled)  # masks of ones: nothing pruned yet
        controller = resu.controller(model)
        controller.set_phase("dense")
    elif compiled:
        model.compile()  # the dense baseline is plain PyTorch
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )

    run = Run(method, model, Score(0.0, 0.0))
    history = MaskHistory()
    batches = task.batches(seed + 1)
    score_every = max(1, settings.steps // CURVE_POINTS)
    label = f"{task.name:6s} | {method.label:14s}"
    with tqdm(total=settings.steps, desc=label, unit="step", dynamic_ncols=True) as bar:
        for span in method.plan:
            with in_phase(span, controller, history, budget):
                for step in range(span.start, span.stop):
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

                    bar.update()
                    if step % 10 == 0:  # reading the loss waits for the device
                        bar.set_postfix_str(f"{span.phase} loss {loss.item():.3f}")
                    if (step + 1) % score_every == 0:
                        run.curve.append((step + 1, evaluate(task, model, quick=True)))

    run.score = evaluate(task, model)
    if controller is not None:
        run.sparsity = controller.sparsity
        run.resurrections = history.resurrections
        run.resurrected_share = history.resurrected_share(controller)
    run.train_s = time.perf_counter() - started
    return run


@contextmanager
def in_phase(
    span: Span, controller: Controller | None, history: MaskHistory, budget: float
) -> Iterator[None]:
    """Enter the phase of ``span``, and commit at its end if it is a RESU phase."""
    if controller is None or span.phase is Phase.DENSE:
        yield
    elif span.phase is Phase.SPARSE:
        if span.sparsity > controller.config.sparsity:
            controller.prune(span.sparsity)
            history.observe(controller)
        yield
    else:
        # theta starts at 0, and the loop's own optimizer trains it beside the active weights
        with controller.resurrect(rule="optimizer", budget=budget) as resurrection:
            yield
        history.resurrections += resurrection.report.resurrected
        history.observe(controller)


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
