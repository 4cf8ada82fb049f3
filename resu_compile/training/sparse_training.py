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

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.errors import ArgumentError
from resu_compile.methods import TrainingMethod
from resu_compile.methods.registry import name_of
from resu_compile.phase import Phase, Routing
from resu_compile.runtime.controller import find_controller
from resu_compile.runtime.gradient_score import all_finite
from resu_compile.training.attach import attach, checked_model
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import CycleEvent, CycleStats
from resu_compile.training.data_needs import check_calibration
from resu_compile.training.distributed import masks_of_first
from resu_compile.training.method_run import Run
from resu_compile.training.method_stats import UpdateStats
from resu_compile.training.plan import Span, Stage

STATE_VERSION = 1


class SparseTraining(Run):
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
        calibration: what a calibrated ``criterion`` measures, as in ``Cycle``.

    Attributes:
        method: the training method; those of ``Run`` besides.
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
        super().__init__(
            plain, config, on_event=on_event, on_pause=on_pause, calibration=calibration
        )
        self.method: TrainingMethod = config.training_method()
        check_calibration(config, calibration)
        self._started = False
        attach(plain, config)
        self.controller.agree = masks_of_first

    # -- where it is ---------------------------------------------------------------------------
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

    # -- going on ------------------------------------------------------------------------------
    def start(self) -> SparseTraining:
        """Choose the first masks; later calls do nothing.

        Returns:
            Itself.
        """
        if not self._started:
            self._forget_masks()
            self.method.begin(self)
            self._started = True  # not of a run whose settings turned out not to fit
            self._prepare_step()
        return self

    def _forget_masks(self) -> None:
        """The DENSE phase, with full masks: those of a run before are none of this one."""
        controller = self.controller
        if controller.sparsity > 0.0:
            controller.remask({name: torch.ones_like(m) for name, m in controller.masks.items()})
        controller.set_phase("dense")

    def after_backward(self, *, loss_scale: float = 1.0) -> bool:
        """Look at the gradients, and change the masks if it is time.

        Args:
            loss_scale: what the loss was multiplied by (``GradScaler.get_scale()``). With another
                one than 1 gradients may have overflowed; an update then waits for the next step.

        Returns:
            False if a change of masks takes the place of this step. All gradients are then None, so
            that ``optimizer.step()`` does nothing; ``GradScaler.step()`` has to be left out.

        Raises:
            ArgumentError: all steps are done, or it was called before in this step.
        """
        self._check_goes_on("after_backward")
        self.start()
        if self._seen_backward:
            raise ArgumentError(
                "after_backward: expected one call a step, after the last backward() of it, got "
                "another one before after_step()"
            )
        self._seen_backward = True
        controller, self.loss_scale = self.controller, loss_scale
        if loss_scale != 1.0 and self.method.looks_at_gradients(self) and not self._is_finite():
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
        else:
            controller.choose_places(loss_scale=loss_scale)
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
        self.start()
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
            controller.dense_gradients or self.method.looks_at_gradients(self)
        )

    def _is_finite(self) -> bool:
        return all_finite([p.grad for p in self.model.parameters() if p.grad is not None])

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
        self.master, self.cycle = None, None
        if state["master"] is not None:
            self.keep_values()
            assert self.master is not None
            self.master.load_state_dict(state["master"])
        if self._started:
            self.method.resume(self)
        if self.cycle is not None and state["cycle"] is not None:
            self.cycle.load_state_dict(state["cycle"])
        if self._started:
            self._prepare_step()


def _copied(value: Any) -> Any:
    """A tree of dicts, lists, tensors and plain data, tensors copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value
