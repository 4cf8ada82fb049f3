"""A training loop that is ready: what ``Cycle`` leaves to the user, done the ordinary way.

trainer = Trainer(model, optimizer, loss_fn, TrainingConfig(steps=5000, sparsity=0.9))
result = trainer.fit(loader)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import is_training_method
from resu_compile.runtime.controller import find_controller
from resu_compile.training.batches import Batches, BatchStream
from resu_compile.training.callbacks import Callback, ProgressBar
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import Cycle, CycleEvent, CycleStats
from resu_compile.training.distributed import (
    from_first,
    gather,
    is_first,
    on_first,
    rank,
    world_size,
)
from resu_compile.training.patience import Patience
from resu_compile.training.plan import Span, Stage
from resu_compile.training.random_state import random_state, restore_random_state
from resu_compile.training.records import (
    masks_record,
    pause_record,
    start_record,
    step_record,
)
from resu_compile.training.resume import check_unused, check_world, newest_state
from resu_compile.training.sparse_training import SparseTraining
from resu_compile.training.stats import Record, StatsWriter
from resu_compile.training.stepper import LossFn, Stepper

Evaluate = Callable[[nn.Module], Mapping[str, float]]
STATE_VERSION = 1


@dataclass(frozen=True)
class TrainingResult:
    """What ``Trainer.fit`` returns.

    Attributes:
        history: one entry for each cycle.
        stats: the records of the stats, whether they went to a file or not.
        best: best value of the early-stop metric among the evaluations that counted; None without.
        stopped_early: True if the early stop ended the run.
        steps: optimizer steps done, those before a resume included.
    """

    history: tuple[CycleStats, ...]
    stats: tuple[Record, ...]
    best: float | None
    stopped_early: bool
    steps: int


class Trainer:
    """Trains ``model`` by the plan of ``config``.

    Args:
        model: any module, on its device. It is sparsified here unless it has been. Of several
            ranks each gives its ``DistributedDataParallel``.
        optimizer: of the model's parameters.
        loss_fn: ``(model, batch) -> scalar tensor``, with the model as it was given; it moves the
            batch to the device, if need be.
        config: the run.
        callbacks: told of everything, in this order.
        evaluate: ``(model) -> {metric: number}``, called in eval mode, without gradients and
            without compilation, with the plain model, on all ranks; the numbers of rank 0 count.
        scheduler: stepped after each optimizer step.
        on_pause: ``(model, cycle)``, called at the pauses of a densification.
        calibration: inputs that some pruning methods measure, as in ``Cycle``.
        progress: show a progress bar.

    Attributes:
        model: the plain model.
        cycle: where the run is, a ``Cycle``, or a ``SparseTraining`` with a training method; its
            ``controller`` and ``history``.
        stats: the records so far.

    Raises:
        ArgumentTypeError: an argument has a wrong type.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn,
        config: TrainingConfig,
        *,
        callbacks: Sequence[Callback] = (),
        evaluate: Evaluate | None = None,
        scheduler: LRScheduler | None = None,
        on_pause: Callable[[nn.Module, int], object] | None = None,
        calibration: Any = None,
        progress: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ArgumentTypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        if not callable(loss_fn):
            raise ArgumentTypeError(f"loss_fn: expected a function, got {loss_fn!r}")
        if isinstance(scheduler, ReduceLROnPlateau):
            raise ArgumentTypeError(
                "scheduler: expected one that steps without a metric, got ReduceLROnPlateau; "
                "step it in a callback's on_evaluate instead"
            )
        if config.early_stop is not None and evaluate is None:
            raise ArgumentError("evaluate: expected a function, because early_stop needs one")
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.config = config
        self.callbacks = [*callbacks, *([ProgressBar()] if progress else [])]
        self.evaluate = evaluate
        self.scheduler = scheduler
        driver = SparseTraining if is_training_method(config.method) else Cycle
        self.cycle: Cycle | SparseTraining = driver(
            model, config, on_event=self._on_event, on_pause=on_pause, calibration=calibration
        )
        self._method = self.cycle if isinstance(self.cycle, SparseTraining) else None
        self._check_early_stop()
        self.model = self.cycle.model
        self._writer = StatsWriter(config.stats if is_first() else None)
        self._patience = Patience(config.early_stop) if config.early_stop else None
        self._stopped = False
        self._batches: BatchStream | None = None
        self._batches_state: Mapping[str, Any] | None = None
        self._random: Mapping[str, Any] | None = None
        # of the beginning, for a method that goes back to it
        self._schedule = None if scheduler is None else copy.deepcopy(scheduler.state_dict())
        self._stepper = Stepper(model, optimizer, loss_fn, config, scheduler)

    def _check_early_stop(self) -> None:
        rule, run = self.config.early_stop, self._method
        if rule is None or run is None or not rule.recovery_only:
            return
        if run.method.settled(run) >= run.steps:
            raise ArgumentError(
                f"early_stop.recovery_only: expected False with method={self.config.method!r}, "
                "whose masks change up to the last step, so that no recovery begins; got True"
            )

    @property
    def stats(self) -> list[Record]:
        """The records so far, those before a resume included if they went to a file."""
        return self._writer.records

    # -- the run -------------------------------------------------------------------------------
    def fit(self, batches: Batches, *, resume: bool = False) -> TrainingResult:
        """Train to the end of the plan, or until the early stop.

        Args:
            batches: a ``DataLoader`` or anything that can be iterated anew for each epoch, or a
                function from the epoch to its batches. An epoch that ends within an optimizer step
                is followed by the next one.
            resume: go on from the newest checkpoint in ``config.checkpoint.folder``, if there is
                one; otherwise begin.

        Raises:
            ArgumentError: the loss is no scalar, NaN or infinite; the message names the step. Or a
                fresh run is to write into a folder with checkpoints of another, which a later
                resume would take for its own.
        """
        if resume:
            state = newest_state(self._checkpoint().folder)
            if state is not None:
                self.load(state)
        elif self.config.checkpoint is not None and self.cycle.step_index == 0:
            check_unused(self.config.checkpoint.folder)
        self._batches = BatchStream(batches)
        if self._batches_state is not None:
            self._batches.load_state_dict(self._batches_state)
        self.model.train()
        resumed = self.cycle.step_index > 0
        if not resumed:
            self._writer.begin()
            self._writer.write("start", 0, **start_record(self.config))
        for callback in self.callbacks:
            callback.on_start(self)
        self.cycle.start()
        if self._random is not None:  # after everything else that may draw
            restore_random_state(self._random)
            self._random = self._batches_state = None
        while not self.cycle.done and not self._stopped:
            self._step()
        return self._end()

    def _step(self) -> None:
        cycle, config = self.cycle, self.config
        span, done = cycle.span, cycle.step_index + 1
        assert self._batches is not None
        loss = self._stepper.step(self._batches, done, cycle)
        if self._method is not None:
            self._method.conceal()  # no one looks at what only the optimizer is to see
        if done % config.log_every == 0 or done == span.stop:
            self._stepper.watch.check()  # before a pruning, which would name no step
            record = step_record(self.model, self.optimizer, loss, span)
            self._writer.write("step", done, **record)
        for callback in self.callbacks:
            callback.on_step(self, loss)
        due = config.evaluate_every is not None and done % config.evaluate_every == 0
        last = done == config.steps
        if due and not last:
            self._evaluate(span, done)  # the model as it was trained, before it is pruned again
        if isinstance(cycle, SparseTraining):
            cycle.after_step()
        else:
            cycle.step()
        if last:
            self._evaluate(span, done)  # the model as it is shipped
        checkpoint = config.checkpoint
        if checkpoint is not None and (done % checkpoint.every == 0 or last or self._stopped):
            self.save()

    def _evaluate(self, span: Span, step: int) -> None:
        if self.evaluate is None:
            return
        self.model.eval()
        try:
            eager = torch.compiler.set_stance("force_eager")  # not worth another compilation
            with torch.no_grad(), eager, self._stepper.autocast():
                found = self.evaluate(self.model)
        finally:
            self.model.train()
        if not isinstance(found, Mapping):
            raise ArgumentTypeError(
                f"evaluate: expected a mapping from metric to number, got {found!r}"
            )
        metrics = from_first({name: float(value) for name, value in found.items()})
        self._writer.write(
            "evaluation", step, cycle=span.cycle, stage=str(span.stage), metrics=metrics
        )
        for callback in self.callbacks:
            callback.on_evaluate(self, metrics)
        rule = self.config.early_stop
        if self._patience is None or rule is None:
            return
        if rule.recovery_only and span.stage is not Stage.RECOVER:
            return
        if self._patience.see(metrics) and step < self.config.steps:
            self._stopped = True

    def _on_event(self, event: CycleEvent) -> None:
        """Hear of what the cycle did between two steps."""
        if event.pause is not None:
            self._writer.write("pause", event.step, **pause_record(event))
            for callback in self.callbacks:
                callback.on_pause(self, event.pause)
            self.model.train()
            return
        if event.kind == "rewind":
            self._rewind(event)
            return
        controller, report = self.cycle.controller, event.report
        assert controller is not None
        assert report is not None
        self._writer.write(event.kind, event.step, **masks_record(event, controller))
        for callback in self.callbacks:
            if event.kind == "prune":
                callback.on_prune(self, report)
            else:
                callback.on_commit(self, report)

    def _rewind(self, event: CycleEvent) -> None:
        """The learning rate begins again with the weights."""
        self._writer.write("rewind", event.step, cycle=event.cycle)
        if self.scheduler is not None and self._schedule is not None:
            self.scheduler.load_state_dict(copy.deepcopy(self._schedule))
            rates = self.scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _end(self) -> TrainingResult:
        cycle = self.cycle
        if self._stopped:
            rule = self.config.early_stop
            assert rule is not None
            reason = f"{rule.metric} has not improved in {rule.patience} evaluations"
            self._writer.write("stop", cycle.step_index, reason=reason)
            for callback in self.callbacks:
                callback.on_stop(self, reason)
        before = self._method_stats()  # a densified model has no controller afterwards
        cycle.finish()  # a run that stops early may be pruned here
        controller = find_controller(self.model)
        sparsity = 0.0 if controller is None else controller.sparsity
        told = self._method_stats() or before
        best = None if self._patience is None else self._patience.best
        self._writer.write("end", cycle.step_index, sparsity=sparsity, best=best, **told)
        result = TrainingResult(
            tuple(cycle.history), tuple(self.stats), best, self._stopped, cycle.step_index
        )
        for callback in self.callbacks:
            callback.on_end(self, result)
        return result

    def _method_stats(self) -> dict[str, Any]:
        if self._method is None or find_controller(self.model) is None:
            return {}
        return {"method": self._method.stats().as_dict()}

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """All that a bit-exact continuation needs beside the states of model and optimizer.

        Plain data and tensors. Take it between two steps. Of several ranks, each has random states
        and a position in the data of its own; ``save`` gathers them.
        """
        controller = find_controller(self.model)
        batches = self._batches.state_dict() if self._batches is not None else None
        patience = self._patience
        return {
            "version": STATE_VERSION,
            "step": self.cycle.step_index,
            "epoch": batches["epoch"] if batches else 0,
            "batches_in_epoch": batches["batches_in_epoch"] if batches else 0,
            "batches": batches,
            "cycle": self.cycle.state_dict(),
            "controller": None if controller is None else controller.state_dict(),
            "scaler": self._stepper.scaler.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "rng": random_state(),
            "early_stop": None if patience is None else [patience.best, patience.waited],
            "stopped": self._stopped,
            "stats_lines": len(self.stats),
            "world_size": world_size(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave; ``fit`` then goes on from there.

        The order is: build model, optimizer and trainer; load the model's state; this; load the
        optimizer's state. ``load`` does it all.

        Raises:
            ArgumentError: no such state, another version, or the state of another plan.
        """
        if not isinstance(state, Mapping) or "cycle" not in state or "version" not in state:
            raise ArgumentError("state: expected what Trainer.state_dict() returns")
        if state["version"] != STATE_VERSION:
            raise ArgumentError(
                f"state: expected version {STATE_VERSION}, got {state['version']!r}; load it with "
                "the release that wrote it"
            )
        check_world(state.get("world_size", 1))
        if (state["scheduler"] is None) != (self.scheduler is None):
            expected = "none" if state["scheduler"] is None else "one"
            raise ArgumentError(f"scheduler: expected {expected}, as in the saved run")
        controller = find_controller(self.model)
        if controller is not None and state["controller"] is not None:
            controller.load_state_dict(state["controller"])
        self.cycle.load_state_dict(state["cycle"])
        if controller is not None and state["controller"] is None:
            controller.release()
        if self._stepper.scaler.is_enabled() and state["scaler"]:
            self._stepper.scaler.load_state_dict(state["scaler"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(dict(state["scheduler"]))
        if self._patience is not None and state["early_stop"] is not None:
            self._patience.best, self._patience.waited = state["early_stop"]
        self._stopped = state["stopped"]
        own = state["ranks"][rank()] if "ranks" in state else state
        self._batches_state = own["batches"]
        self._random = own["rng"]
        self._writer.resume(state["stats_lines"])

    def save(self) -> Path:
        """Write a checkpoint of everything to ``config.checkpoint.folder``.

        Of several ranks, all call it: rank 0 writes, and the others wait until it is there.

        Returns:
            Where it is.

        Raises:
            ArgumentError: the config has no ``checkpoint``, or safetensors is not installed.
        """
        from resu_compile.training.checkpoint import save_checkpoint

        self._stepper.watch.check()
        where = self._checkpoint()
        trainer = self.state_dict()
        if world_size() > 1:
            trainer["ranks"] = gather({key: trainer[key] for key in ("batches", "rng")})
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "trainer": trainer,
        }
        step = self.cycle.step_index
        return on_first(lambda: save_checkpoint(where.folder, state, step=step, keep=where.keep))

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over a whole checkpoint: the states of model, trainer and optimizer.

        Args:
            state: what ``load_checkpoint`` gave, with keys ``model``, ``trainer``, ``optimizer``.
        """
        self.model.load_state_dict(state["model"])
        self.load_state_dict(state["trainer"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _checkpoint(self) -> Any:
        if self.config.checkpoint is None:
            raise ArgumentError(
                "checkpoint: expected config.checkpoint=CheckpointConfig(folder) in a run that is "
                "saved or resumed, got None"
            )
        return self.config.checkpoint
