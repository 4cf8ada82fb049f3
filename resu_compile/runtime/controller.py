"""The controller of a sparsified model: phase, masks, resurrection, commits, state.

It changes mask *contents* only; the compiled graphs take the masks as inputs and pick the variant
of the current phase at call time.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from resu_compile.config import (
    CompileConfig,
    ResurrectionConfig,
    SparsityConfig,
)
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    NotSparsifiedError,
    PhaseError,
    WeightError,
    check_flag,
    check_known_keys,
    check_sparsity,
)
from resu_compile.kernels.mask_bits import pack_mask
from resu_compile.phase import Phase, Routing
from resu_compile.runtime import controller_state, optimizer_hooks
from resu_compile.runtime.allocation import check_calibration, new_generator, new_masks
from resu_compile.runtime.commit import commit_masks, pattern_layouts, takes_score
from resu_compile.runtime.commit_report import CommitReport, compare_masks
from resu_compile.runtime.controller_state import PRUNE_ARGUMENTS
from resu_compile.runtime.dense_release import ReleaseReport, check_dense, request, restore
from resu_compile.runtime.gradient_moments import DECAY, GradientMoments
from resu_compile.runtime.gradient_score import all_finite
from resu_compile.runtime.mask_history import MaskHistory
from resu_compile.runtime.module_hooks import AfterForward, BeforeForward, ControllerSlot
from resu_compile.runtime.open_contest import limit_entry
from resu_compile.runtime.optimizer_state import zero_state
from resu_compile.runtime.resurrection import Resurrection
from resu_compile.selection import NamedWeight, check_overrides, check_values
from resu_compile.state import MaskedWeight

if TYPE_CHECKING:
    from resu_compile.calibration import Calibration


Agree = Callable[["Controller", Mapping[str, Tensor]], Mapping[str, Tensor]]


def find_controller(model: nn.Module) -> Controller | None:
    """The controller of ``model`` (or of the module that ``torch.compile`` wrapped), or None."""
    inner = getattr(model, "_orig_mod", model)
    for hook in inner._forward_pre_hooks.values():
        if isinstance(hook, BeforeForward):
            return hook.slot.controller
    return None


def controller(model: nn.Module) -> Controller:
    """The controller of a sparsified model.

    Args:
        model: what ``sparsify`` returned, or what ``torch.compile(model, backend="resu")`` returned
            after its first call.

    Raises:
        ArgumentTypeError: ``model`` is no ``nn.Module``.
        NotSparsifiedError: ``model`` has no controller.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    found = find_controller(model)
    if found is None:
        raise NotSparsifiedError(
            f"model: expected a sparsified model, got a plain {type(model).__name__}; call "
            "resu_compile.sparsify(model) first, or run the compiled model once if it was made "
            "with torch.compile(backend='resu'); a submodule is reached through its root"
        )
    return found


class Controller:
    """Masks, phase and resurrection of one model.

    Built by ``sparsify``; reached by ``controller(model)``.

    Attributes:
        released: what ``release_dense`` has freed so far; None unless it was called.
        moments: mean squares of gradients, if ``track_gradients`` was called.
        agree: asked for the masks in place of each new choice, before it is applied; how several
            processes come to the same ones (training/distributed.py).
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Iterable[tuple[NamedWeight, Tensor]],
        config: SparsityConfig,
        skipped: Mapping[str, str],
        compile_config: CompileConfig | None = None,
        slot: ControllerSlot | None = None,
        phase: Phase = Phase.SPARSE,
        generator: torch.Generator | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self.config = config
        self.compile_config = compile_config or CompileConfig()
        self.skipped = dict(skipped)
        self.generator = generator or new_generator(config.seed)
        self.resurrection: Resurrection | None = None
        self.history = MaskHistory()
        self.agree: Agree | None = None
        self.epoch = 0
        self.structure = 0
        self.released: ReleaseReport | None = None
        self.moments: GradientMoments | None = None
        self._phase = phase
        self._dense_gradients = False
        self._compiled_call: weakref.ref[Any] | None = None
        self._weights: dict[str, MaskedWeight] = {}
        optimizer_hooks.install()
        optimizer_hooks.watch(self)
        try:
            for named, mask in masks:
                self._weights[named.name] = MaskedWeight(named, mask, self)
            if slot is None:
                slot = ControllerSlot(self)
                model.register_forward_pre_hook(BeforeForward(slot), prepend=True)
                model.register_forward_hook(AfterForward(slot))
            self.refresh()
        except BaseException:  # out of memory, say
            self._detach(model)
            raise

    # -- what it looks after -------------------------------------------------------------------
    @property
    def model(self) -> nn.Module:
        """The model.

        Raises:
            NotSparsifiedError: the model is gone, or was released.
        """
        found = self._model()
        if found is None:
            raise NotSparsifiedError("controller: expected its model to be alive, it is gone")
        if find_controller(found) is not self:
            raise NotSparsifiedError(
                "controller: expected a model under its control, it was released"
            )
        return found

    @property
    def weights(self) -> Mapping[str, MaskedWeight]:
        """Parameter name -> masked weight."""
        return self._weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of the weight's shape, True = active; copies."""
        return {name: weight.mask for name, weight in self._weights.items()}

    @property
    def sparsity(self) -> float:
        """Share of pruned entries over all masked weights, in [0, 1)."""
        total = sum(weight.numel for weight in self._weights.values())
        active = sum(weight.nnz for weight in self._weights.values())
        return 1.0 - active / total if total else 0.0

    @property
    def routing(self) -> Routing:
        """Where gradients of masked weights go now."""
        if self._phase is Phase.DENSE:
            return Routing.ALL
        if self._phase is Phase.SPARSE:
            return Routing.ALL if self._dense_gradients else Routing.ACTIVE
        assert self.resurrection is not None
        return self.resurrection.routing

    @property
    def freezes_all(self) -> bool:
        """Whether only theta may move now."""
        running, model = self.resurrection, self._model()
        if running is None or running.config.freeze != "all" or model is None:
            return False
        return find_controller(model) is self

    def refresh(self) -> None:
        """Catch up with what happened to the parameters outside of optimizer steps.

        In the SPARSE phase a weight written by anything else (``load_state_dict``, an average of
        checkpoints) gets its zeros back. The model's call does this by itself, at the cost of a
        check a weight. Writes through ``.data`` pass that check; they are found at the first and
        then at every 32nd optimizer step.
        """
        running = self.resurrection
        if running is not None:
            running.recover(self._weights)
        sees_zeros = self._phase is Phase.SPARSE or (
            running is not None and running.hidden is not None and not running.committing
        )
        for weight in self._weights.values():
            weight.refresh(sees_zeros)

    # -- phase ---------------------------------------------------------------------------------
    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self._phase

    def set_phase(self, phase: str | Phase) -> None:
        """Switch the phase. Masks stay; each variant compiles the first time it runs.

        ``"dense"`` trains every place and keeps the masks for later; going back to ``"sparse"``
        applies them again, so that what the pruned places learned is zeroed. ``"resu"`` begins a
        resurrection with the defaults of ``resurrect``.

        Raises:
            ArgumentError: unknown phase.
            PhaseError: leaving ``"resu"``, which only ``commit()`` and ``abandon()`` do.
        """
        try:
            target = Phase(phase)
        except ValueError:
            raise ArgumentError(
                f"phase: expected one of dense, sparse, resu; got {phase!r}"
            ) from None
        if target is self._phase:
            return
        check_dense(self, "set_phase")
        if self._phase is Phase.RESU:
            raise PhaseError(
                f"set_phase: expected phase dense or sparse before switching to {target}, but a "
                "resurrection is running; commit() keeps the winners, abandon() drops theta"
            )
        if target is Phase.RESU:
            self._begin(ResurrectionConfig())
            return
        self._phase = target
        self.epoch += 1
        if target is Phase.SPARSE:
            self._zero_pruned()

    @property
    def dense_gradients(self) -> bool:
        """Whether gradients reach the pruned places in the SPARSE phase too."""
        return self._dense_gradients

    def set_dense_gradients(self, on: bool) -> None:
        """Let gradients reach the pruned places in the SPARSE phase, or not any more.

        ``.grad`` is then that of a dense weight, for a method that looks at it before the step.
        The optimizer does not see that part: it is zeroed at the beginning of ``step()``, and
        pruned places stay 0. A compiled model has one more graph for it, compiled the first time.

        Raises:
            PhaseError: during a resurrection, which has a routing of its own.
        """
        if on and self._phase is Phase.RESU:
            raise PhaseError(
                "set_dense_gradients: expected phase dense or sparse, got resu, in which the "
                "settings of the resurrection say where gradients go; commit() or abandon() first"
            )
        if on is not self._dense_gradients:
            self._dense_gradients = on
            self.epoch += 1

    def track_gradients(self, decay: float = DECAY) -> None:
        """Keep a decaying mean of squared gradients, which ``"saliency"`` scores by.

        It sees what optimizers step the masked weights with, from the next step on, and costs one
        float32 tensor of each weight's size. Later calls keep what is known.

        Args:
            decay: of the mean, in [0, 1).
        """
        if self.moments is None:
            self.moments = GradientMoments(decay)

    def forget_gradients(self) -> None:
        """Free what ``track_gradients`` keeps."""
        self.moments = None

    def _zero_pruned(self) -> None:
        """Weights and known optimizer state are 0 at the pruned places from here on."""
        for weight in self._weights.values():
            parameter = weight.parameter
            weight.distrust_value()
            weight.enforce_zeros(parameter)
            for optimizer in optimizer_hooks.optimizers_of(weight):
                zero_state(optimizer, parameter, weight.bits, keep=True)
                optimizer_hooks.mark_synced(optimizer, weight)

    # -- masks ---------------------------------------------------------------------------------
    def prune(
        self,
        sparsity: float | None = None,
        *,
        calibration: Calibration | None = None,
        **changes: Any,
    ) -> CommitReport:
        """Prune again from the present values of the weights; the phase is sparse afterwards.

        In the SPARSE phase the active places come first, so that a higher sparsity only takes
        away and a lower one brings back places that hold 0. In the DENSE phase all compete.

        Args:
            sparsity: new overall sparsity, in [0, 1); None keeps the one asked for last.
            calibration: data for a calibrated method, as in ``sparsify``.
            **changes: other fields of ``SparsityConfig`` that decide masks: ``method``, ``scope``,
                ``distribution``, ``overrides``, ``min_density``, ``pattern``. A new pattern brings
                its own sparsity; under a pattern, ``pattern=None`` goes with a new sparsity.

        Returns:
            What changed, per weight.

        Raises:
            PhaseError: during a resurrection.
            ArgumentError: an argument is out of range or unknown.
            WeightError: a weight holds NaN or infinity.
        """
        check_dense(self, "prune")
        if self._phase is Phase.RESU:
            raise PhaseError(
                "prune: expected phase dense or sparse, got resu; commit() or abandon() first"
            )
        check_known_keys(changes, PRUNE_ARGUMENTS, what="argument of prune")
        if sparsity is not None:
            changes["sparsity"] = sparsity
        elif changes.get("pattern") is not None:
            changes["sparsity"] = None  # that of the pattern
        config = replace(self.config, from_zeros=False, **changes)
        check_calibration(config, calibration)
        self.refresh()
        named = self.named_weights()
        check_overrides(config.overrides, named)
        active = self.masks if self._phase is Phase.SPARSE else None
        masks = new_masks(
            named,
            config,
            self.generator,
            active,
            calibration=calibration,
            model=self.model,
            moments=self.moments,
        )
        if config.pattern != self.config.pattern:  # what 2:4 kernels rely on
            self.structure += 1
        self.config = config
        return self._apply(masks, "prune")

    def remask(self, masks: Mapping[str, Tensor], strategy: str = "remask") -> CommitReport:
        """Make ``masks`` the masks; the phase is sparse afterwards.

        Places that are new start with the value that is there, which is 0 in the SPARSE phase, and
        with optimizer state 0; places that go lose both; the others keep both.

        Args:
            masks: parameter name -> bool mask of the weight's shape, True = active, of all weights.
            strategy: what the report calls it.

        Returns:
            What changed, per weight.

        Raises:
            PhaseError: during a resurrection.
            ArgumentError: a mask is missing, unknown, of another shape or no bool tensor.
        """
        if self._phase is Phase.RESU:
            raise PhaseError(
                "remask: expected phase dense or sparse, got resu; commit() or abandon() first"
            )
        if set(masks) != set(self._weights):
            raise ArgumentError(
                f"masks: expected one for each of {sorted(self._weights)}, got {sorted(masks)}"
            )
        for name, weight in self._weights.items():
            mask = masks[name]
            if mask.dtype is not torch.bool or mask.shape != weight.shape:
                raise ArgumentError(
                    f"masks: expected a bool tensor of shape {tuple(weight.shape)} for {name}, "
                    f"got {mask.dtype} of shape {tuple(mask.shape)}"
                )
        check_dense(self, "remask")
        self.refresh()
        return self._apply(masks, strategy)

    def named_weights(self) -> list[NamedWeight]:
        """The masked weights with their modules and parameters as they are now."""
        return [
            NamedWeight(name, weight.owner, weight.attribute, weight.parameter, weight.aliases)
            for name, weight in self._weights.items()
        ]

    def _apply(
        self,
        masks: Mapping[str, Tensor],
        strategy: str,
        *,
        admit: Callable[[Mapping[str, Tensor]], None] | None = None,
        going_on: Resurrection | None = None,
    ) -> CommitReport:
        """Change the masks' contents, weights and optimizer state; ends in SPARSE.

        Newly pruned: weight and optimizer state 0. Newly active: the weight as it is, state 0.
        Survivors: untouched. After the DENSE phase, which trains every place, all kept survive.

        Args:
            masks: parameter name -> bool mask.
            strategy: what the report calls it.
            admit: called with the masks that were agreed on, before they are applied.
            going_on: the phase stays RESU; pruned places keep its theta, and theta's state.
        """
        if self.agree is not None:
            masks = self.agree(self, masks)
        if admit is not None:
            admit(masks)
        rows = {}
        counts = {name: weight.nnz for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            old, new = weight.mask, masks[name].to(weight.bits.device)
            kept = new if self._phase is Phase.DENSE else old & new
            survivors = pack_mask(kept if going_on is None else kept | ~(old | new))
            self.history.record(weight)
            with optimizer_hooks.state_follows(weight, survivors, packed=going_on is None):
                weight.set_mask(new)
            self.history.record(weight)
            if going_on is not None:
                going_on.settle(weight, old)
            rows[name] = compare_masks(old, new, self.history.ever_active(weight))
        if any(self._weights[name].nnz != count for name, count in counts.items()):
            self.structure += 1
        if going_on is None:
            self._phase = Phase.SPARSE
            self.resurrection = None
        self.epoch += 1
        self.refresh()
        return CommitReport(strategy, rows)

    # -- resurrection --------------------------------------------------------------------------
    def resurrect(self, lr: float | None = None, **options: Any) -> ResurrectionPhase:
        """A RESU phase as a context manager; leaving the block commits.

        Args:
            lr: step size of theta; None follows the optimizer's own learning rate.
            **options: fields of ``ResurrectionConfig``.

        Returns:
            Context manager whose ``report`` tells the commit. An exception inside the block
            commits nothing: the phase stays ``resu`` with theta in place.

        Raises:
            PhaseError: on entering, if a resurrection runs already or the phase is dense.
            ArgumentError: an option is out of range or unknown.
        """
        known = set(ResurrectionConfig.__dataclass_fields__) - {"lr"}
        check_known_keys(options, known, what="argument of resurrect")
        return ResurrectionPhase(self, ResurrectionConfig(lr=lr, **options))

    def _begin(self, config: ResurrectionConfig) -> Resurrection:
        check_dense(self, "resurrect")
        if self._phase is not Phase.SPARSE:
            raise PhaseError(
                f"resurrect: expected phase sparse, got {self._phase}; "
                + (
                    "a resurrection cannot run inside another, commit() or abandon() it first"
                    if self._phase is Phase.RESU
                    else "set_phase('sparse') first"
                )
            )
        self.refresh()
        if takes_score(self.config, config.strategy):
            pattern_layouts(self)  # an error before theta is there
        self.resurrection = Resurrection(config)
        self._phase = Phase.RESU
        self._dense_gradients = False
        self.epoch += 1
        for weight in self._weights.values():
            self.resurrection.init_theta(weight, weight.parameter, self.generator)
        return self.resurrection

    def choose_places(self, *, loss_scale: float = 1.0) -> None:
        """Choose by the gradients that are there which places hold theta, before clipping.

        The first gradient of a resurrection with ``places`` is dense, and would be clipped as such;
        from here on it is 0 outside of the places that train. ``optimizer.step()`` makes the choice
        if nothing has made it before. Anything else than that first step is left alone.

        Args:
            loss_scale: what the loss was multiplied by; with another one than 1, gradients that
                have overflowed choose nothing.
        """
        running = self.resurrection
        if running is None or not running.is_choosing:
            return
        grads = [w.parameter.grad for w in self._weights.values() if w.parameter.grad is not None]
        if loss_scale != 1.0 and not all_finite(grads):
            return
        for weight in self._weights.values():
            running.choose(weight, weight.parameter)
            if weight.live is not None:
                weight.clean_gradient(weight.parameter, running.routing)

    def commit(
        self,
        budget: float | None = None,
        score: str | Callable[[str, Tensor], Tensor] | None = None,
        strategy: str | None = None,
        *,
        kind: str | None = None,
        margin: float | None = None,
        sparsity: float | None = None,
        overrides: Mapping[str, float] | None = None,
        calibration: Any = None,
        go_on: bool = False,
    ) -> CommitReport:
        """End the RESU phase: decide who is active from now on.

        Args:
            budget: share of each weight's kept places for the resurrected, in [0, 1].
            score: ``"magnitude"`` |W|, ``"gradient"`` |W| |g|, ``"wanda"`` |W| times the norm of
                its input, or a callable (name, weight) -> score tensor of its shape.
            strategy: ``"amnesty"`` is a tournament inside each weight, between active and
                resurrected; ``"open"`` lets all weights' places compete by the pruning method, of
                the pruned no more than the budget; ``"reprune"`` the same without a budget;
                ``"merge"`` keeps all theta, so that density grows to 1. Under a pattern each keeps
                N of each M: ``"amnesty"`` and ``"open"`` exchange inside the groups, up to the
                budget over all of them, and ``"merge"`` keeps the best N of each group.
            kind: of ``"amnesty"``: with ``"quota"`` the best of the resurrected take the whole
                budget; with ``"ceiling"`` they take at most that, each from an active one that it
                beats by ``margin``.
            margin: of ``"ceiling"``: a score has to be over (1 + margin) times the other, >= 0.
            sparsity: overall sparsity from now on, in [0, 1), spread over the weights as ``prune``
                would; places that no active one holds go to the best of the pruned. None keeps
                each weight's count.
            overrides: with ``sparsity``: as in ``prune``; None keeps those asked for last.
            calibration: of ``score="wanda"``, or of ``"reprune"`` by a calibrated method: inputs to
                measure, as ``prune`` takes them.
            go_on: True holds the tournament in the middle of a resurrection with ``hidden=True``:
                the phase stays resu, and theta of those that did not come back goes on.

        None takes what ``resurrect`` was given.

        Returns:
            What changed, per weight.

        Raises:
            PhaseError: no resurrection is running.
            ArgumentError: an argument is out of range, or a score is missing, NaN or infinite.
            WeightError: a weight holds NaN or infinity.

        On an error the phase stays resu, with theta in place.
        """
        check_dense(self, "commit")
        if self._phase is not Phase.RESU or self.resurrection is None:
            raise PhaseError(
                f"commit: expected phase resu, got {self._phase}; begin one with resurrect()"
            )
        running = self.resurrection
        given: dict[str, Any] = {
            "budget": budget,
            "score": score,
            "strategy": strategy,
            "kind": kind,
            "margin": margin,
        }
        terms = replace(running.config, **{k: v for k, v in given.items() if v is not None})
        if score is None and running.score_lost and takes_score(self.config, terms.strategy):
            raise ArgumentError(
                "score: expected 'magnitude' or a function, because this resurrection was begun "
                "with a function and then saved or copied, which only keeps data; got None"
            )
        pruning = None
        if sparsity is not None:
            if terms.strategy == "merge" and sparsity != 0.0:
                raise ArgumentError(
                    "sparsity: expected None or 0.0 with strategy='merge', which keeps all places, "
                    f"got {sparsity!r}; strategy='amnesty' takes a new sparsity"
                )
            pruning = replace(
                self.config,
                sparsity=check_sparsity(sparsity),
                overrides=self.config.overrides if overrides is None else overrides,
                from_zeros=False,
            )
            check_overrides(pruning.overrides, self.named_weights())
        elif overrides is not None:
            raise ArgumentError(
                "overrides: expected None without sparsity, which keeps each weight's count, got "
                f"{dict(overrides)!r}"
            )
        if check_flag(go_on, name="go_on") and running.hidden is None:
            raise ArgumentError(
                "go_on: expected False unless theta is hidden, because the network has come to use "
                "what it sees; resurrect(hidden=True), or commit and resurrect again"
            )
        self.refresh()
        with running.shown(self._weights):
            check_values(self.named_weights())
            masks = commit_masks(self, terms, pruning, calibration)
            limits = terms.strategy == "open" and running.hidden is not None
            running.report = self._apply(
                masks,
                terms.strategy,
                admit=partial(limit_entry, self, pruning or self.config) if limits else None,
                going_on=running if go_on else None,
            )
        self.config = pruning or self.config
        return running.report

    def abandon(self) -> None:
        """End the RESU phase without a commit: theta is dropped and the zeros return.

        With ``freeze_active=True`` the weights are bit-exactly those from before the phase.

        Raises:
            PhaseError: no resurrection is running.
        """
        if self._phase is not Phase.RESU:
            raise PhaseError(f"abandon: expected phase resu, got {self._phase}")
        self._phase = Phase.SPARSE
        self.resurrection = None
        self.epoch += 1
        self._zero_pruned()

    # -- compilation ---------------------------------------------------------------------------
    def compile(self, *, fullgraph: bool = False, dynamic: bool | None = None) -> None:
        """Compile the model's call in place, with one graph variant per phase.

        A copied or unpickled model runs eagerly until this is called.

        Args:
            fullgraph: raise at the first graph break.
            dynamic: as in ``torch.compile``.
        """
        from resu_compile.backend import compile_in_place

        call = compile_in_place(self, fullgraph=fullgraph, dynamic=dynamic)
        self._compiled_call = weakref.ref(call)  # it holds the model

    def release_dense(self) -> ReleaseReport:
        """Free the dense storage of the weights that only sparse kernels read; for inference.

        Each is freed at the first compiled call without gradients that uses it, and that call is
        captured again. The phase stays SPARSE: what needs dense weights (gradients, ``prune``,
        ``resurrect``, ``load_state_dict``) raises until ``restore_dense()``. ``state_dict()``,
        copies, eager calls and graphs of other backends unpack what they read, weight by weight.
        Moving or casting the model makes its weights dense, until the next such call.

        Returns:
            The report, also at ``released``; it grows as weights are freed.

        Raises:
            PhaseError: the phase is not sparse.
        """
        if self.released is None:
            self.refresh()
            self.released = request(self)
            self._choose_again()
        return self.released

    def restore_dense(self) -> None:
        """Undo ``release_dense``: every weight is dense again and may change."""
        if self.released is not None:
            restore(self)
            self.released = None
            self._choose_again()

    def _choose_again(self) -> None:
        """Let graphs choose their kernels anew."""
        self.structure += 1
        self.epoch += 1

    # -- state ---------------------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Masks, phase, what ``prune`` goes by, theta's state and the random generator.

        The weights, theta included, are in the model's own ``state_dict()``. It is plain data and
        tensors, which load with ``torch.load(weights_only=True)``, and all of it is a copy. A
        method or score that was given as an object or a function is not data and is left out.
        """
        return controller_state.state_of(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave. Nothing changes if the state does not fit.

        Load it together with the model's own state, in either order, after ``sparsify`` and before
        the first forward pass: ``sparsify`` zeroes by masks of its own what was loaded before it.

        Raises:
            ArgumentError: not such a state, another version, or other names or shapes of weights.
        """
        check_dense(self, "load_state_dict")
        controller_state.load_state(self, state)

    def snapshot(self) -> dict[str, Any]:
        """All that a copy of the model needs to rebuild this controller.

        Weights go by the module that owns them, which a copy or a pickle takes along: their names
        may have changed since (an adapter wrapped around a layer).
        """
        return controller_state.snapshot_of(self)

    @classmethod
    def from_snapshot(
        cls, model: nn.Module, snapshot: Mapping[str, Any], slot: ControllerSlot
    ) -> Controller:
        """The controller of a copied or unpickled ``model``, which already has the hooks."""
        made = cls(
            model,
            controller_state.masks_of_snapshot(snapshot),
            snapshot["config"],
            snapshot["skipped"],
            snapshot["compile_config"],
            slot=slot,
            # resu: theta is in the weights and must not be zeroed
            phase=Phase(snapshot["state"]["phase"]),
        )
        made.load_state_dict(snapshot["state"])
        return made

    def release(self) -> nn.Module:
        """Make the model plain again: zeros stay folded in, hooks and compilation are gone.

        Weights that are no longer there (a layer was replaced) are let go as well.

        Returns:
            The model. This controller cannot be used afterwards.

        Raises:
            PhaseError: during a resurrection, whose theta would be lost.
            NotSparsifiedError: it was released before.
        """
        if self._phase is Phase.RESU:
            raise PhaseError("release: expected phase dense or sparse, got resu; commit() first")
        self.restore_dense()
        model = self.model
        for weight in self._weights.values():
            with suppress(WeightError):
                weight.refresh(self._phase is Phase.SPARSE)
                optimizer_hooks.let_go(weight)
        compiled = self._compiled_call and self._compiled_call()
        if compiled is not None and model._compiled_call_impl is compiled:
            model._compiled_call_impl = None
        self._detach(model)
        self._phase = Phase.DENSE
        self.epoch += 1
        return model

    def _detach(self, model: nn.Module) -> None:
        for weight in self._weights.values():
            weight.unbind()
        self._weights = {}
        for hooks in (model._forward_pre_hooks, model._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, (BeforeForward, AfterForward)):
                    del hooks[key]


class ResurrectionPhase(AbstractContextManager["ResurrectionPhase"]):
    """One RESU phase as a block; ``report`` tells the commit once the block was left."""

    def __init__(self, owner: Controller, config: ResurrectionConfig) -> None:
        self._owner = owner
        self.config = config
        self._begun: Resurrection | None = None

    def __enter__(self) -> ResurrectionPhase:
        self._begun = self._owner._begin(self.config)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None and self._begun is self._owner.resurrection:
            self._owner.commit()

    @property
    def report(self) -> CommitReport:
        """What the commit did, at the end of the block or inside it.

        Raises:
            PhaseError: nothing was committed (yet).
        """
        if self._begun is None or self._begun.report is None:
            raise PhaseError("report: expected a committed phase, but the block has not committed")
        return self._begun.report
