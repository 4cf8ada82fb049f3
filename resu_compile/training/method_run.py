"""What a training method works with: weights, gradients, masks and a memory, of one run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resu_compile.comparison import RowLayout, parse_pattern, pattern_mask
from resu_compile.errors import ArgumentError
from resu_compile.methods import is_calibrated
from resu_compile.methods.criteria import Criterion, Places, scored
from resu_compile.runtime import optimizer_hooks
from resu_compile.runtime.allocation import new_masks
from resu_compile.runtime.commit import pattern_layouts
from resu_compile.runtime.commit_report import CommitReport, compare_masks
from resu_compile.runtime.controller import Controller, find_controller
from resu_compile.runtime.mask_history import MaskHistory
from resu_compile.runtime.master_weights import MasterWeights
from resu_compile.runtime.packed_masks import PackedMasks
from resu_compile.training.config import TrainingConfig
from resu_compile.training.cycle import Cycle, CycleEvent
from resu_compile.training.flops import ModelFlops, StepCosts
from resu_compile.training.method_stats import MethodStats, UpdateStats

BETAS = (0.9, 0.999)  # of the means of gradients: torch's Adam, and the usual momentum


class Run:
    """One run of a training method; ``SparseTraining`` drives it.

    Args:
        model: the plain model, with a controller.
        config: of the run.
        on_event: called with each ``CycleEvent``.
        on_pause: of a RESU run, as in ``Cycle``.
        calibration: inputs that a calibrated criterion measures.

    Attributes:
        model: as given.
        config: as given.
        steps: optimizer steps of the whole run.
        step: of these, how many are done.
        updates: one ``UpdateStats`` for each change of masks that was reported.
        memory: what the method has to remember: tensors and plain data.
        master: the full values of weights that keep them where they are pruned; None without.
        cycle: the phases of a RESU run; None for all other methods.
        postponed: whether the last step was left alone because a gradient had overflowed.
        loss_scale: what the loss of this step was multiplied by.
        costs: what the steps have cost.
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
        self.model = model
        self.config = config
        self.steps = config.steps
        self.step = 0
        self.updates: list[UpdateStats] = []
        self.memory: dict[str, Any] = {}
        self.master: MasterWeights | None = None
        self.cycle: Cycle | None = None
        self.postponed = False
        self.loss_scale = 1.0
        self.costs = StepCosts()
        self.calibration = calibration
        self.on_pause = on_pause
        self._on_event = on_event
        self._seen_backward = False

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
    def generator(self) -> torch.Generator:
        """The controller's CPU generator."""
        return self.controller.generator

    # -- gradients -----------------------------------------------------------------------------
    def places(self) -> Iterator[Places]:
        """What a criterion may look at, of each weight; one after another."""
        means, squares = self.memory.get("mean", {}), self.memory.get("square", {})
        layouts = pattern_layouts(self.controller)
        for name, weight in self.controller.weights.items():
            parameter = weight.parameter
            value = parameter.detach() if self.master is None else self.master.value(name)
            gradient = None if parameter.grad is None else parameter.grad.detach()
            if gradient is None and self._seen_backward:
                gradient = torch.zeros_like(value)
            if gradient is not None and self.loss_scale != 1.0:
                gradient = gradient / self.loss_scale
            yield Places(
                name,
                value,
                weight.mask,
                self.generator,
                gradient,
                means.get(name),
                squares.get(name),
                partial(self._fill, layouts[name]) if layouts else None,
            )

    def trained_places(self) -> Iterator[Places]:
        """``places`` of the weights that train; a frozen one would only lose what it drops."""
        for places in self.places():
            if self.controller.weights[places.name].parameter.requires_grad:
                yield places

    def _fill(self, layout: RowLayout, kept: Tensor, score: Tensor) -> Tensor:
        """The mask with the ``kept`` places and the highest scores of each group that has room."""
        pattern = self.controller.config.pattern
        assert pattern is not None
        return pattern_mask(score, layout, parse_pattern(pattern), kept, keep_lower=True)

    def observe_gradients(self, *, square: bool = False) -> None:
        """Add the gradients of this step to their decaying means.

        Args:
            square: keep the means of their squares too.
        """
        kinds = ("mean", "square") if square else ("mean",)
        for kind, beta in zip(kinds, BETAS, strict=False):
            means = self.memory.setdefault(kind, {})
            for places in self.places():
                assert places.gradient is not None
                wide = torch.promote_types(places.gradient.dtype, torch.float32)
                value = places.gradient.to(wide)
                value = value.square() if kind == "square" else value
                known = means.get(places.name)
                if known is None:
                    means[places.name] = value * (1.0 - beta)
                else:
                    means[places.name] = known.to(value.device).lerp_(value, 1.0 - beta)

    def forget_gradients(self) -> None:
        """Drop what ``observe_gradients`` keeps: two copies of the weights at most."""
        self.memory.pop("mean", None)
        self.memory.pop("square", None)

    def set_gradient(self, name: str, gradient: Tensor) -> None:
        """Let the optimizer step the weight ``name`` with ``gradient``, that of the unscaled loss.

        A weight without one, frozen or unused in this step, is left alone as by any optimizer.
        """
        parameter = self.controller.weights[name].parameter
        if parameter.grad is not None:
            parameter.grad = (gradient * self.loss_scale).to(parameter.dtype)

    def reset_optimizer(self) -> None:
        """Forget the state that optimizers have of the model's parameters, masked or not."""
        parameters = list(self.model.parameters())
        for optimizer in optimizer_hooks.all_optimizers():
            for parameter in parameters:
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
        share = target / config.sparsity if config.sparsity else 1.0
        report = self.controller.prune(
            target,
            calibration=self.calibration if is_calibrated(method) else None,
            pattern=config.pattern,
            method=method,
            scope=config.scope,
            distribution=config.distribution,
            min_density=config.min_density,
            overrides={name: value * share for name, value in config.overrides.items()},
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
        """The masks that the last ``prune`` would choose from the full values of now."""
        controller = self.controller
        named = controller.named_weights()
        if self.master is not None:
            value = self.master.value
            named = [replace(w, parameter=nn.Parameter(value(w.name), False)) for w in named]
        return new_masks(named, controller.config, controller.generator)

    def remask(self, masks: Iterable[tuple[str, Tensor]], strategy: str) -> CommitReport:
        """Make ``masks`` the masks, as ``Controller.remask`` does.

        Args:
            masks: name and bool mask of weights; one after another, so that only their bits are
                held together. Other weights keep theirs.
            strategy: what the report calls it.
        """
        controller = self.controller
        chosen = PackedMasks(masks)
        for name, weight in controller.weights.items():
            if name not in chosen:
                chosen.add(name, weight.mask)
        report = controller.remask(chosen, strategy)
        self.tell("update", report)
        return report

    # -- values of pruned weights ----------------------------------------------------------------
    def keep_values(self) -> None:
        """From now on pruned weights keep their values in ``master``."""
        self.master = MasterWeights(self.controller)

    def conceal(self) -> None:
        """Between ``optimizer.step()`` and ``after_step()``: the model as forward passes see it."""
        if self.master is not None:
            self.master.conceal()

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


class _Scores:
    """A criterion in the form of a pruning method, which knows a weight by its memory."""

    def __init__(self, criterion: Criterion, places: Iterable[Places]) -> None:
        self._criterion = criterion
        self._places = {item.weight.data_ptr(): item for item in places}

    def score(self, weight: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG002
        """The criterion's score of ``weight``."""
        return scored(self._criterion, self._places[weight.data_ptr()])
