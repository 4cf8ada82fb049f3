"""Any training method, driven from any loop by two calls.

run = SparseTraining(model, TrainingConfig(method="rigl", sparsity=0.9, steps=5000)).start()
while not run.done:
    loss_of(model, next(batches)).backward()
    run.after_backward()
    optimizer.step()
    optimizer.zero_grad()
    run.after_step()
run.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.comparison import RowLayout, parse_pattern, pattern_mask
from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.methods import TrainingMethod, is_calibrated
from resu_compile.methods.criteria import Criterion, Places, scored
from resu_compile.methods.registry import name_of
from resu_compile.phase import Phase, Routing
from resu_compile.runtime import optimizer_hooks
from resu_compile.runtime.allocation import new_masks
from resu_compile.runtime.commit import pattern_layouts
from resu_compile.runtime.commit_report import CommitReport, compare_masks
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.runtime.mask_history import MaskHistory
from resu_compile.runtime.master_weights import MasterWeights
from resu_compile.runtime.packed_masks import PackedMasks
from resu_compile.training.attach import attach
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import Cycle, CycleEvent, CycleStats
from resu_compile.training.distributed import masks_of_first, plain_model
from resu_compile.training.flops import ModelFlops, StepCosts
from resu_compile.training.method_stats import MethodStats, UpdateStats
from resu_compile.training.plan import Span, Stage

STATE_VERSION = 1
BETAS = (0.9, 0.999)  # of the means of gradients: torch's Adam, and the usual momentum


class SparseTraining:
    """Runs the training method of ``config``; the loop stays the user's own.

    ``after_backward()`` comes after the backward pass (of the last batch of a step, with gradient
    accumulation) and before clipping and ``optimizer.step()``; ``after_step()`` after that. Dense
    gradients are computed on the steps that a method needs them, and no optimizer sees them.

    To resume: build the model, the optimizer and this, then load the state of the model, of
    ``controller``, of the optimizer and of this, in this order.

    Args:
        model: any module. One that ``sparsify`` has taken up keeps its targets; its masks are
            chosen anew. Of a ``DistributedDataParallel``, the model inside is meant.
        config: its ``method`` names a training method, ``method_options`` its settings; ``steps``,
            ``sparsity``, ``scope``, ``distribution``, ``min_density``, ``overrides``, ``pattern``,
            ``targets``, ``exclude``, ``seed`` and ``compile`` count as well.
        on_event: called with each ``CycleEvent``: ``"prune"``, ``"update"``, ``"rewind"`` (of a
            lottery ticket, without a report), and those of a RESU run.
        on_pause: of a RESU run, as in ``Cycle``.
        calibration: the same.

    Attributes:
        model: the plain model.
        config: as given.
        method: the training method.
        steps: optimizer steps of the whole run.
        step: of these, how many are done.
        updates: one ``UpdateStats`` for each change of masks that was reported.
        memory: what the method has to remember: tensors and plain data.
        master: the full values of weights that keep them where they are pruned; None without.
        cycle: the phases of a RESU run; None for all other methods.
        postponed: whether the last update was put off because a gradient had overflowed.
        costs: what the steps have cost.
        loss_scale: what the loss of this step was multiplied by.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainingConfig,
        *,
        on_event: Callable[[CycleEvent], None] | None = None,
        on_pause: Callable[[nn.Module, int], object] | None = None,
        calibration: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        if not isinstance(config, TrainingConfig):
            raise ArgumentTypeError(
                f"config: expected a TrainingConfig, got {type(config).__name__}"
            )
        self.model = plain_model(model)
        self.config = config
        self.method: TrainingMethod = config.training_method()
        self.steps = config.steps
        self.step = 0
        self.updates: list[UpdateStats] = []
        self.memory: dict[str, Any] = {}
        self.master: MasterWeights | None = None
        self.cycle: Cycle | None = None
        self.postponed = False
        self.costs = StepCosts()
        self.calibration = calibration
        self.on_pause = on_pause
        self._on_event = on_event
        self._started = False
        self._seen_backward = False
        self.loss_scale = 1.0
        attach(self.model, config)
        self.controller.agree = masks_of_first

    # -- where it is ---------------------------------------------------------------------------
    @property
    def controller(self) -> Controller:
        """The model's controller.

        Raises:
            ArgumentError: it was released.
        """
        found = find_controller(self.model)
        if found is None:
            raise ArgumentError(
                "run: expected its model to have a controller, but it was released; a finished "
                "run cannot go on, build a new one"
            )
        return found

    @property
    def done(self) -> bool:
        """True once all steps are done."""
        return self.step >= self.steps

    @property
    def step_index(self) -> int:
        """``step``, by the name that it has in a ``Cycle``."""
        return self.step

    @property
    def span(self) -> Span:
        """The span of the next step: masks may change in the first, and stay in the second."""
        if self.cycle is not None:
            return self.cycle.span
        settled = min(max(self.method.settled(self), 0), self.steps)
        sparsity = self.controller.sparsity
        if self.step < settled:
            return Span(0, settled, Stage.TRAIN, -1, sparsity)
        return Span(settled, self.steps, Stage.RECOVER, -1, sparsity)

    @property
    def history(self) -> list[CycleStats]:
        """The cycles of a RESU run; empty for all other methods."""
        return [] if self.cycle is None else self.cycle.history

    @property
    def generator(self) -> torch.Generator:
        """The controller's CPU generator."""
        return self.controller.generator

    # -- going on ------------------------------------------------------------------------------
    def start(self) -> SparseTraining:
        """Choose the first masks; later calls do nothing.

        Returns:
            Itself.
        """
        if not self._started:
            self._started = True
            self.controller.set_phase("dense")
            self.method.begin(self)
            self._prepare_step()
        return self

    def after_backward(self, *, loss_scale: float = 1.0) -> bool:
        """Look at the gradients, and change the masks if it is time.

        Args:
            loss_scale: what the loss was multiplied by (``GradScaler.get_scale()``). With another
                one than 1 gradients may have overflowed; an update then waits for the next step.

        Returns:
            False if a change of masks takes the place of this step. All gradients are then None, so
            that ``optimizer.step()`` does nothing; ``GradScaler.step()`` has to be left out.
        """
        self._check_goes_on("after_backward")
        self.start()
        self._seen_backward = True
        controller, self.loss_scale = self.controller, loss_scale
        if loss_scale != 1.0 and controller.dense_gradients and not self._is_finite():
            self.postponed = True
            return True  # the scaler leaves this step out
        replaced = self.method.before_step(self)
        self.postponed = False
        if replaced:
            for parameter in self.model.parameters():
                parameter.grad = None
        elif controller.phase is Phase.SPARSE:
            for weight in controller.weights.values():
                weight.clean_gradient(weight.parameter, Routing.ACTIVE)
        return not replaced

    def after_step(self) -> SparseTraining:
        """Count one ``optimizer.step()``, and change the masks if it is time.

        Returns:
            Itself.

        Raises:
            ArgumentError: all steps are done, or the method needed a gradient at this step and
                ``after_backward()`` was not called.
        """
        self._check_goes_on("after_step")
        self.start()
        if not self._seen_backward and self._needs_backward():
            raise ArgumentError(
                "after_step: expected after_backward() between backward() and optimizer.step(), "
                f"which {type(self.method).__name__} needs at step {self.step}; it was not called"
            )
        self.step += 1
        self.costs.count()
        self.method.after_step(self)
        self._prepare_step()
        return self

    def finish(self) -> nn.Module:
        """End the run, early or not; the model is sparse afterwards.

        Returns:
            The model.
        """
        self.method.finish(self)
        controller = find_controller(self.model)
        if controller is not None:
            controller.set_dense_gradients(False)
            controller.agree = None
        self.master = None
        return self.model

    def _check_goes_on(self, call: str) -> None:
        if self.done:
            raise ArgumentError(
                f"{call}: expected at most {self.steps} steps, which this run has; stop the loop "
                "when run.done, or give the config more steps"
            )

    def _prepare_step(self) -> None:
        """Route the gradients of the next step, and note what it will cost."""
        self._seen_backward = False
        controller = find_controller(self.model)
        if controller is None:  # a densified model that was made plain
            return
        if controller.phase is not Phase.RESU:
            controller.set_dense_gradients(not self.done and self.method.needs_dense_gradient(self))
        self.costs.prepare(controller, self.memory.get("gradient_shares"))

    def _needs_backward(self) -> bool:
        controller = find_controller(self.model)
        return controller is not None and (
            controller.dense_gradients or self.method.needs_dense_gradient(self)
        )

    def _is_finite(self) -> bool:
        grads = [parameter.grad for parameter in self.model.parameters()]
        checks = [torch.isfinite(grad).all() for grad in grads if grad is not None]
        return all(bool(check) for check in checks)

    # -- what methods work with ----------------------------------------------------------------
    def places(self) -> Iterator[Places]:
        """What a criterion may look at, of each weight; one after another."""
        means, squares = self.memory.get("mean", {}), self.memory.get("square", {})
        layouts = pattern_layouts(self.controller)
        for name, weight in self.controller.weights.items():
            parameter = weight.parameter
            value = parameter.detach() if self.master is None else self.master.value(name)
            gradient = parameter.grad
            if gradient is None and self._seen_backward:
                gradient = torch.zeros_like(value)
            yield Places(
                name,
                value,
                weight.mask,
                self.generator,
                None if gradient is None else gradient.detach(),
                means.get(name),
                squares.get(name),
                partial(self._fill, layouts[name]) if layouts else None,
            )

    def _fill(self, layout: RowLayout, kept: Tensor, score: Tensor) -> Tensor:
        """The mask with the ``kept`` places and the highest scores of each group that has room."""
        pattern = self.controller.config.pattern
        assert pattern is not None
        return pattern_mask(score, layout, parse_pattern(pattern), kept, keep_lower=True)

    def observe_gradients(self) -> None:
        """Add the gradients of this step, and their squares, to their decaying means."""
        for kind, beta in zip(("mean", "square"), BETAS, strict=True):
            means = self.memory.setdefault(kind, {})
            for places in self.places():
                assert places.gradient is not None
                wide = torch.promote_types(places.gradient.dtype, torch.float32)
                value = places.gradient.to(wide) / self.loss_scale
                value = value.square() if kind == "square" else value
                known = means.get(places.name)
                if known is None:
                    means[places.name] = value * (1.0 - beta)
                else:
                    means[places.name] = known.to(value.device).lerp_(value, 1.0 - beta)

    def set_gradient(self, name: str, gradient: Tensor) -> None:
        """Let the optimizer step the weight ``name`` with ``gradient``."""
        parameter = self.controller.weights[name].parameter
        parameter.grad = gradient.to(parameter.dtype)

    def reset_optimizer(self) -> None:
        """Forget the state that the optimizers of the masked weights have of the model."""
        weights = self.controller.weights.values()
        optimizers = {id(o): o for weight in weights for o in optimizer_hooks.optimizers_of(weight)}
        for optimizer in optimizers.values():
            for parameter in self.model.parameters():
                optimizer.state.pop(parameter, None)

    # -- masks ---------------------------------------------------------------------------------
    def prune(self, sparsity: float | None = None, *, method: Any = "magnitude") -> CommitReport:
        """Prune as the config says; in the SPARSE phase active places come first.

        Args:
            sparsity: None is that of the config.
            method: what ``sparsify`` takes as method.
        """
        config = self.config
        target = config.sparsity if sparsity is None else sparsity
        report = self.controller.prune(
            target,
            calibration=self.calibration if is_calibrated(method) else None,
            pattern=config.pattern,
            method=method,
            scope=config.scope,
            distribution=config.distribution,
            min_density=config.min_density,
            overrides={k: v * target / config.sparsity for k, v in config.overrides.items()},
        )
        if self.step == 0:
            report = self._begin_history(report)
        self.tell("prune", report)
        return report

    def _begin_history(self, report: CommitReport) -> CommitReport:
        """Nothing was trained with the full mask that was before the first one."""
        controller = self.controller
        controller.history = MaskHistory()
        for weight in controller.weights.values():
            controller.history.record(weight)
        rows = {name: replace(row, ever_active=row.active) for name, row in report.weights.items()}
        return CommitReport(report.strategy, rows)

    def prune_by(self, criterion: Criterion, sparsity: float | None = None) -> CommitReport:
        """Prune as the config says, by a criterion of ``methods/criteria.py``.

        Args:
            criterion: may look at the gradients of this step.
            sparsity: None is that of the config.
        """
        report = self.prune(sparsity, method=_Scores(criterion, self.places()))
        controller = self.controller
        controller.config = replace(controller.config, method="magnitude")  # scores are of now
        return report

    def chosen_masks(self) -> Mapping[str, Tensor]:
        """The masks that the last ``prune`` would choose from the weights as they are now."""
        controller = self.controller
        return new_masks(controller.named_weights(), controller.config, controller.generator)

    def remask(self, masks: Iterable[tuple[str, Tensor]], strategy: str) -> CommitReport:
        """Make ``masks`` the masks, as ``Controller.remask`` does.

        Args:
            masks: name and bool mask of each weight; one after another, so that only their bits
                are held together.
            strategy: what the report calls it.
        """
        report = self.controller.remask(PackedMasks(masks), strategy)
        self.tell("update", report)
        return report

    def keep_values(self) -> None:
        """From now on pruned weights keep their values in ``master``."""
        self.master = MasterWeights(self.controller)

    def hide(self, masks: Iterable[tuple[str, Tensor]], strategy: str) -> CommitReport:
        """``remask`` with values and optimizer state kept at pruned places.

        Args:
            masks: name and bool mask of each weight.
            strategy: what the report calls it.
        """
        assert self.master is not None
        controller = self.controller
        before = PackedMasks(controller.masks.items())
        chosen: Mapping[str, Tensor] = PackedMasks(masks)
        if controller.agree is not None:
            chosen = controller.agree(controller, chosen)
        self.master.hide(chosen)
        report = CommitReport(
            strategy,
            {
                name: compare_masks(
                    before[name], weight.mask, controller.history.ever_active(weight)
                )
                for name, weight in controller.weights.items()
            },
        )
        self.tell("update", report)
        return report

    def drop_hidden(self) -> None:
        """Values and optimizer state at pruned places are 0 from here on."""
        if self.master is not None:
            self.master.hide()
            self.controller.remask(self.controller.masks)

    def tell(self, kind: str, report: CommitReport) -> None:
        """Note a change of masks, and tell of it."""
        self.updates.append(UpdateStats.of(self.step, report))
        if self._on_event is not None:
            self._on_event(CycleEvent(kind, self.step, -1, report))

    def tell_of_rewind(self, level: int) -> None:
        """Tell that the weights went back to earlier values; ``level`` begins."""
        if self._on_event is not None:
            self._on_event(CycleEvent("rewind", self.step, level))

    def hear(self, event: CycleEvent) -> None:
        """Pass on what the cycle of a RESU run did."""
        if event.report is not None:
            self.updates.append(UpdateStats.of(event.step, event.report))
        if self._on_event is not None:
            self._on_event(event)

    # -- what it did ---------------------------------------------------------------------------
    def stats(self, flops: ModelFlops | None = None) -> MethodStats:
        """Rs, churn, layer densities and relative costs so far.

        Args:
            flops: what ``count_flops(model, inputs)`` gave; None counts one product an entry.
        """
        return MethodStats.of(self.controller, self.updates, self.costs, flops)

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, as plain data and tensors; all of it is a copy.

        Masks and random generator are in ``controller.state_dict()``. Take it between two steps.
        """
        return {
            "version": STATE_VERSION,
            "method": name_of(self.method) or type(self.method).__qualname__,
            "steps": self.steps,
            "step": self.step,
            "started": self._started,
            "postponed": self.postponed,
            "updates": [update.as_dict() for update in self.updates],
            "memory": _copied(self.memory),
            "master": None if self.master is None else self.master.state_dict(),
            "cycle": None if self.cycle is None else self.cycle.state_dict(),
            "costs": self.costs.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, after the controller's own state was loaded.

        Raises:
            ArgumentError: no such state, another version, or that of another run.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(own) - set(state):
            raise ArgumentError(
                f"state: expected what SparseTraining.state_dict() returns, with keys {sorted(own)}"
            )
        for key in ("version", "method", "steps"):
            if state[key] != own[key]:
                raise ArgumentError(
                    f"state: expected {key} {own[key]!r}, as this run has, got {state[key]!r}; "
                    "resume with the config and the release that the run was begun with"
                )
        self.step, self._started = state["step"], state["started"]
        self.postponed = state["postponed"]
        self.updates = [UpdateStats(**update) for update in state["updates"]]
        self.memory = _copied(state["memory"])
        self.costs.load_state_dict(state["costs"])
        if state["master"] is not None:
            self.master = MasterWeights(self.controller)
            self.master.load_state_dict(state["master"])
        if state["cycle"] is not None:
            self.method.resume(self)
            assert self.cycle is not None
            self.cycle.load_state_dict(state["cycle"])
        if self._started:
            self._prepare_step()


class _Scores:
    """A criterion in the form of a pruning method, which knows a weight by its memory."""

    def __init__(self, criterion: Criterion, places: Iterable[Places]) -> None:
        self._criterion = criterion
        self._places = {item.weight.data_ptr(): item for item in places}

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The criterion's score of ``weight``."""
        return scored(self._criterion, self._places[weight.data_ptr()])


def _copied(value: Any) -> Any:
    """A tree of dicts, lists, tensors and plain data, tensors copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
