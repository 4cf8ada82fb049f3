"""The phases of a training run, driven from any loop.

cycle = Cycle(model, TrainingConfig(steps=5000, sparsity=0.9))
optimizer = torch.optim.AdamW(model.parameters())
cycle.start()
while not cycle.done:
    loss_of(model, next(batches)).backward()
    optimizer.step()
    optimizer.zero_grad()
    cycle.step()
cycle.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from resu_compile.errors import ArgumentError
from resu_compile.methods import is_calibrated, is_training_method
from resu_compile.phase import Phase
from resu_compile.runtime.commit_report import CommitReport
from resu_compile.runtime.controller import Controller, ResurrectionPhase, find_controller
from resu_compile.training.attach import attach, checked_model
from resu_compile.training.config import TrainingConfig
from resu_compile.training.data_needs import check_calibration, commit_measures, sees_gradients
from resu_compile.training.densify import Pause
from resu_compile.training.distributed import masks_of_first, sync_masks
from resu_compile.training.plan import (
    Plan,
    Span,
    Stage,
    build_plan,
    cycle_budgets,
    cycle_margins,
    cycle_sparsities,
)

STATE_VERSION = 1


@dataclass(frozen=True)
class CycleStats:
    """What one cycle did, as plain data.

    Attributes:
        cycle: its index, from 0 on.
        step: optimizer steps done at its end.
        sparsity: share of pruned weights at its end, as counted.
        budget: budget of its commit.
        prune: ``CommitReport.as_dict()`` of its last pruning; None if it did not prune.
        commit: the same of its commit; None if it had no RESU stage.
    """

    cycle: int
    step: int
    sparsity: float
    budget: float
    prune: dict[str, Any] | None
    commit: dict[str, Any] | None


@dataclass(frozen=True)
class CycleEvent:
    """Something that ``Cycle`` did between two steps.

    Attributes:
        kind: ``"prune"``, ``"commit"`` or ``"pause"``; of a training method also ``"update"`` and
            ``"rewind"``.
        step: optimizer steps done.
        cycle: the cycle that it belongs to; -1 outside of cycles.
        report: what a pruning or a commit changed.
        pause: the pause.
    """

    kind: str
    step: int
    cycle: int
    report: CommitReport | None = None
    pause: Pause | None = None


class Cycle:
    """Drives the phases of ``model`` by the plan of ``config``; the loop stays the user's own.

    ``step()`` comes once after each ``optimizer.step()``. At the borders of the plan's spans it
    prunes, begins a RESU phase, commits with that cycle's budget, or enters the recovery. Nothing
    else of a loop needs to change:

        cycle = Cycle(model, preset("default", steps=2000))
        optimizer = torch.optim.AdamW(model.parameters())
        cycle.start()
        while not cycle.done:
            for batch in loader:
                loss_of(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
                if cycle.step().done:
                    break
        model = cycle.finish()

    To resume: build the model, the optimizer and the ``Cycle``, then load the state of the model,
    of ``cycle.controller``, of the optimizer and of the cycle, in this order.

    Args:
        model: any module. One without a controller gets it here, with nothing pruned yet; one that
            ``sparsify`` has taken up before keeps its targets. Of a ``DistributedDataParallel``,
            the model inside is meant.
        config: the plan. Fields about the loop itself (``accumulate``, ``clip_norm``, ...) have no
            part in it; they belong to ``Trainer``.
        on_event: called with each ``CycleEvent``, after it happened.
        on_pause: called as ``on_pause(model, cycle)`` at the pauses of a densification.
        calibration: what a calibrated method or ``score="wanda"`` measures, as in ``sparsify``:
            batches that can be iterated at each pruning and commit anew, or a function
            ``forward_loop(model)``.

    Attributes:
        model: the plain model.
        config: as given.
        plan: the spans.
        sparsities: what each cycle ends with.
        budgets: of each cycle's commit.
        margins: of the same.
        step_index: optimizer steps done.
        history: one ``CycleStats`` for each cycle that has ended.
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
        plain = checked_model(model, config)
        if is_training_method(config.method):
            raise ArgumentError(
                f"config: expected a pruning method, got method={config.method!r}, which changes "
                "masks in a way of its own; SparseTraining(model, config) and Trainer run it"
            )
        check_calibration(config, calibration)
        self.model = plain
        self.config = config
        self.plan: Plan = build_plan(config)
        self.sparsities = cycle_sparsities(config)
        self.budgets = cycle_budgets(config)
        self.margins = cycle_margins(config)
        self.step_index = 0
        self.history: list[CycleStats] = []
        self._on_event = on_event
        self._on_pause = on_pause
        self._calibration = calibration
        self._position = 0
        self._started = False
        self._pruned: dict[str, Any] | None = None
        self._found = attach(self.model, config)
        self._required().agree = masks_of_first
        if sees_gradients(config):
            self._track_gradients()

    # -- where it is ---------------------------------------------------------------------------
    @property
    def controller(self) -> Controller | None:
        """The model's controller; None once a densified model was made plain."""
        return find_controller(self.model)

    @property
    def span(self) -> Span:
        """The span of the next step; at the end, the last one."""
        return self.plan[min(self._position, len(self.plan) - 1)]

    @property
    def stage(self) -> Stage:
        """The stage of the next step."""
        return self.span.stage

    @property
    def done(self) -> bool:
        """True once all steps of the plan are done."""
        return self.step_index >= self.plan[-1].stop

    def _required(self) -> Controller:
        found = self.controller
        if found is None:
            raise ArgumentError(
                "cycle: expected its model to have a controller, but it was released; a finished "
                "cycle cannot go on, build a new one"
            )
        return found

    def _track_gradients(self) -> None:
        controller = self._required()
        frozen = [n for n, w in controller.weights.items() if not w.parameter.requires_grad]
        if frozen:
            if not self._found:  # what the message advises begins with a plain model
                controller.release()
            raise ArgumentError(
                f"method: expected weights that train with method={self.config.method!r}, which "
                f"scores by their gradients, but {frozen[0]} has requires_grad=False "
                f"({len(frozen)} in all); leave them out with exclude=, or choose 'magnitude' as "
                "method and as resurrection.score"
            )
        controller.track_gradients()

    # -- going on ------------------------------------------------------------------------------
    def start(self) -> Cycle:
        """Do what the first span asks for, before the first step; later calls do nothing.

        ``step()`` does it too, one optimizer step late: a plan without warm-up that begins sparse
        needs this call.

        Returns:
            Itself.
        """
        if not self._started:
            self._started = True
            if self._found:  # by masks that each rank has chosen for itself
                sync_masks(self._required())
            self._enter(self.plan[0])
        return self

    def after_backward(self, *, loss_scale: float = 1.0) -> bool:
        """Call it between the last ``backward()`` of a step and clipping, in a loop that clips.

        The first gradient of a RESU phase in which theta has few ``places`` is dense; the places
        are chosen here then, and clipping sees the gradient of what trains.

        Args:
            loss_scale: what the loss was multiplied by (``GradScaler.get_scale()``).

        Returns:
            True: the step is to be taken.
        """
        controller = self.controller
        if controller is not None:
            controller.choose_places(loss_scale=loss_scale)
        return True

    def step(self) -> Cycle:
        """Count one ``optimizer.step()`` and cross the border of a span, if this is one.

        Returns:
            Itself.

        Raises:
            ArgumentError: the plan has no step left.
            WeightError: at a pruning or a commit, a weight holds NaN or infinity.
        """
        if self.done:
            raise ArgumentError(
                f"step: expected at most {self.plan[-1].stop} steps, which this plan has; stop the "
                "loop when cycle.done, or give the config more steps"
            )
        self.start()
        self.step_index += 1
        span = self.span
        if self.step_index == span.stop:
            self._leave(span)
            self._position += 1
            if not self.done:
                self._enter(self.span)
        return self

    def finish(self) -> nn.Module:
        """End the run, early or not: an open RESU phase is committed.

        A densified model that holds no pruned weight any more is made plain.

        Returns:
            The model.
        """
        controller = self.controller
        if controller is None:
            return self.model
        if controller.phase is Phase.RESU:
            self._leave(self.span, ends=True)
        controller.agree = None
        controller.forget_gradients()
        if self.config.densify is not None and controller.sparsity == self.config.sparsity == 0.0:
            controller.release()
        return self.model

    def _enter(self, span: Span) -> None:
        """Bring the model into the phase and to the sparsity of ``span``."""
        controller = self._required()
        if span.sparsity == 0.0:
            controller.set_phase("dense")
            return
        # a commit that kept all theta
        merged = controller.sparsity == 0.0 and controller.resurrection is None
        same = controller.config.sparsity == span.sparsity and not merged
        if controller.phase is Phase.DENSE or not same:
            self._prune(controller, span)
        if span.stage is Stage.RESU:
            config = replace(
                self.config.resurrection,
                budget=self.budgets[span.cycle],
                margin=self.margins[span.cycle],
            )
            if controller.resurrection is not None:  # theta goes on
                controller.resurrection.config = config
            else:
                ResurrectionPhase(controller, config).__enter__()  # _leave commits it

    def _goes_on(self, position: int) -> bool:
        """Whether theta goes on in the span at ``position``, after a tournament between the two."""
        theta = self.config.resurrection
        following = self.plan[position] if position < len(self.plan) else None
        return (
            theta.hidden
            and theta.strategy != "merge"  # which leaves no theta
            and self.config.densify is None
            and following is not None
            and following.stage is Stage.RESU
            and following.sparsity > 0.0
        )

    def _prune(self, controller: Controller, span: Span) -> None:
        config = self.config
        report = controller.prune(
            span.sparsity,
            calibration=self._calibration if is_calibrated(config.method) else None,
            pattern=config.pattern,
            method=config.method,
            scope=config.scope,
            distribution=config.distribution,
            min_density=config.min_density,
            overrides=self._overrides(span.sparsity),
        )
        self._pruned = report.as_dict()
        self._tell(CycleEvent("prune", self.step_index, span.cycle, report))

    def _overrides(self, sparsity: float) -> dict[str, float]:
        """Those of the config, in proportion to ``sparsity``."""
        highest = max(self.config.initial_sparsity, *self.sparsities)
        return {name: v * sparsity / highest for name, v in self.config.overrides.items()}

    def _leave(self, span: Span, *, ends: bool = False) -> None:
        """Commit at the end of a RESU span, and close the books of a cycle at its end.

        Args:
            span: that of the last step.
            ends: nothing follows, whatever the plan says.
        """
        following = self._position + 1
        last = following >= len(self.plan) or self.plan[following].cycle != span.cycle
        if span.cycle < 0:
            return
        committed = None
        controller = self._required()
        if controller.phase is Phase.RESU:
            target = self.sparsities[span.cycle]
            options: dict[str, Any] = {"sparsity": target} if target < span.sparsity else {}
            if not ends and self._goes_on(following):
                target = self.plan[following].sparsity
                options = {"sparsity": target, "overrides": self._overrides(target), "go_on": True}
            if callable(self.config.resurrection.score):  # a resumed phase has lost it
                options["score"] = self.config.resurrection.score
            if commit_measures(self.config):
                options["calibration"] = self._calibration
            report = controller.commit(**options)
            committed = report.as_dict()
            self._tell(CycleEvent("commit", self.step_index, span.cycle, report))
        if last:
            self._close(controller, span.cycle, committed)

    def _close(self, controller: Controller, cycle: int, committed: dict[str, Any] | None) -> None:
        self.history.append(
            CycleStats(
                cycle=cycle,
                step=self.step_index,
                sparsity=controller.sparsity,
                budget=self.budgets[cycle],
                prune=self._pruned,
                commit=committed,
            )
        )
        self._pruned = None
        pause = None if self.config.densify is None else self.config.densify.pause_after(cycle)
        if pause is not None:
            if self._on_pause is not None:
                self._on_pause(self.model, cycle)
            self._tell(CycleEvent("pause", self.step_index, cycle, pause=pause))

    def _tell(self, event: CycleEvent) -> None:
        if self._on_event is not None:
            self._on_event(event)

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Where the plan stands, as plain data; the masks are in the controller's own state."""
        return {
            "version": STATE_VERSION,
            "plan": [
                [span.start, span.stop, str(span.stage), span.cycle, span.sparsity]
                for span in self.plan
            ],
            "step_index": self.step_index,
            "started": self._started,
            "pruned": self._pruned,
            "history": [asdict(stats) for stats in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken.

        Raises:
            ArgumentError: no such state, another version, or the state of another plan.
        """
        own = self.state_dict()
        if not isinstance(state, Mapping) or set(own) - set(state):
            raise ArgumentError(
                f"state: expected what Cycle.state_dict() returns, with keys {sorted(own)}"
            )
        if state["version"] != STATE_VERSION:
            raise ArgumentError(
                f"state: expected version {STATE_VERSION}, got {state['version']!r}; load it with "
                "the release that wrote it"
            )
        if [list(span) for span in state["plan"]] != own["plan"]:
            raise ArgumentError(
                "state: expected the same plan as this config makes; resume with the config that "
                "the run was begun with (steps, warmup, recovery, cycles, cycle, sparsity, "
                "schedule, densify)"
            )
        self.step_index = state["step_index"]
        self._started = state["started"]
        self._pruned = state["pruned"]
        self.history = [CycleStats(**stats) for stats in state["history"]]
        self._position = sum(span.stop <= self.step_index for span in self.plan)
