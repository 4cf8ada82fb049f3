"""What a training run is made of, as frozen dataclasses that go to and from YAML and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, cast

from torch import Tensor

from resu_compile.config import DEFAULT_EXCLUDE, ResurrectionConfig, SparsityConfig
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_flag,
    check_integer,
    check_known_keys,
    check_number,
    check_share,
)
from resu_compile.methods import (
    AnyMethod,
    Resu,
    TrainingMethod,
    get_training_method,
    is_calibrated,
    is_gradient_method,
    is_training_method,
)
from resu_compile.training.densify import Densification, Pause
from resu_compile.training.method_settings import settle_method
from resu_compile.training.plan import build_plan, cycle_sparsities
from resu_compile.training.schedules import AUTO, Schedule, check_schedule
from resu_compile.training.serialization import from_plain, read_data, to_plain, write_data

Names = str | tuple[str, ...] | Callable[[str, Tensor], bool]


@dataclass(frozen=True)
class CycleShares:
    """How the steps of one cycle are divided; only the proportions count.

    Attributes:
        train: at the sparsity of the cycle before, >= 0.
        stabilize: sparse, after the pruning, >= 0.
        resu: theta grows in the pruned places, >= 0; 0 is plain gradual pruning.
    """

    train: float = 0.6
    stabilize: float = 0.1
    resu: float = 0.3

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        for name in ("train", "stabilize", "resu"):
            check_number(getattr(self, name), name=f"cycle.{name}", minimum=0.0)
        if self.stabilize + self.resu == 0.0:
            raise ArgumentError(
                "cycle: expected stabilize or resu above 0 (the steps after the pruning), got 0"
            )


# a cycle prunes, and is a resurrection from there to the next pruning
RESU_ONLY: Mapping[str, Any] = {"train": 0.0, "stabilize": 0.0, "resu": 1.0}
# theta that the forward pass does not see; it has to beat the active weights that it displaces
TRIAL: Mapping[str, Any] = {
    "hidden": True,
    "strategy": "open",
    "score": "saliency",
    "kind": "ceiling",
}


def over(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` over ``base``, field by field in the parts that are mappings on both sides.

    Args:
        base: fields of ``TrainingConfig``, ``cycle`` and ``resurrection`` as they were given:
            ``rule="auto"`` is settled once built.
        values: fields that change it.
    """
    found = {**base, **values}
    for key in ("cycle", "resurrection"):
        if isinstance(base.get(key), Mapping) and isinstance(values.get(key), Mapping):
            found[key] = {**base[key], **values[key]}
    return found


@dataclass(frozen=True)
class EarlyStop:
    """Stop when a metric of the evaluation has not improved for a while.

    Attributes:
        metric: its name in what ``evaluate`` returns.
        mode: ``"min"`` or ``"max"``, which way is better.
        patience: how many evaluations without improvement are borne, at least 1.
        min_delta: least difference that counts as an improvement, >= 0.
        recovery_only: True counts evaluations of the recovery stage alone, when the final sparsity
            has been reached; a run is then never stopped half pruned.
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    patience: int = 3
    min_delta: float = 0.0
    recovery_only: bool = True

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        if not isinstance(self.metric, str) or not self.metric:
            raise ArgumentTypeError(f"metric: expected a name, got {self.metric!r}")
        check_choice(self.mode, ("min", "max"), name="mode")
        check_integer(self.patience, name="patience", minimum=1)
        check_number(self.min_delta, name="min_delta", minimum=0.0)
        check_flag(self.recovery_only, name="recovery_only")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where and how often the whole state of a run is written.

    Attributes:
        folder: one folder per checkpoint goes into this one.
        every: optimizer steps between two checkpoints, at least 1; the end always gets one.
        keep: how many of the newest are kept, at least 1.
    """

    folder: str
    every: int = 1000
    keep: int = 2

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        if not isinstance(self.folder, (str, Path)) or not str(self.folder):
            raise ArgumentTypeError(f"folder: expected a path, got {self.folder!r}")
        object.__setattr__(self, "folder", str(self.folder))
        check_integer(self.every, name="every", minimum=1)
        check_integer(self.keep, name="keep", minimum=1)


@dataclass(frozen=True)
class TrainingConfig:
    """A whole run: warm-up, cycles of pruning and resurrection, recovery.

    Attributes:
        steps: optimizer steps in all.
        warmup: share of them that is trained dense before the first cycle, in [0, 1). None is
            ``default_warmup`` of the final sparsity.
        recovery: share of them after the last cycle, in [0, 1).
        cycles: how often the weights are pruned and resurrected.
        cycle: how the steps of one cycle are divided.
        sparsity: after the last cycle, in [0, 1); None is that of ``pattern``.
        initial_sparsity: before the first cycle, in [0, 1).
        schedule: how sparsity goes from the one to the other: ``"auto"``, the steeper the sparser
            the goal (``auto_shape``); a name of ``resu_compile.training.schedules.SHAPES``; one
            sparsity per cycle; or a function of t.
        method: as in ``SparsityConfig``, for the cycles of RESU; or a training method, by name or
            as an object, which takes their place (docs/methods.md).
        method_options: settings of a training method that is given by name.
        scope: as in ``SparsityConfig``, and so are the next six. None is ``"layer"``, or the
            training method's own.
        distribution: how sparsity is spread over the layers; None is ``"uniform"``, or the
            training method's own.
        min_density: least density of a layer.
        overrides: name or glob -> sparsity of those weights at the highest sparsity of the run;
            at a lower one, in proportion. None with a sparsity that falls.
        pattern: ``"N:M"`` from the first pruning on, with its ``sparsity``,
            and ``schedule="constant"``; every commit keeps it.
        targets: what is pruned.
        exclude: what is left dense.
        resurrection: how theta is trained and committed; its ``budget`` gives way to the next two.
        budget_start: budget of the first cycle's commit, in [0, 1].
        budget_end: budget of the last cycle's; linear in between.
        margin_end: margin of the last cycle's commit with ``kind="ceiling"``, >= 0; linear from
            the ``margin`` of ``resurrection``. None keeps that one.
        densify: sparsity falls from its start to ``sparsity``; ``schedule`` has then no part.
        accumulate: batches per optimizer step.
        clip_norm: largest norm of all gradients together; None does not clip.
        autocast: dtype of mixed precision; ``"float16"`` scales the loss.
        evaluate_every: optimizer steps between evaluations; None evaluates at the end alone.
        log_every: optimizer steps between the step lines of the stats.
        early_stop: when to stop before the end.
        checkpoint: where and how often the state is written.
        stats: path of the stats file, one JSON object a line.
        seed: seed of the controller's random generator.
        compile: compile the model.
    """

    steps: int = 5000
    warmup: float | None = None
    recovery: float = 0.2
    cycles: int = 40
    cycle: CycleShares = field(default_factory=lambda: CycleShares(**RESU_ONLY))
    sparsity: float = 0.7
    initial_sparsity: float = 0.0
    schedule: Schedule = AUTO
    method: str | AnyMethod | TrainingMethod = "saliency"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    scope: Literal["layer", "global"] = cast("Any", None)  # settled when built
    distribution: Literal["uniform", "er", "erk"] = cast("Any", None)  # settled when built
    min_density: float = 0.01
    overrides: Mapping[str, float] = field(default_factory=dict)
    pattern: str | None = None
    targets: Names | None = None
    exclude: Names | None = DEFAULT_EXCLUDE
    resurrection: ResurrectionConfig = field(default_factory=lambda: ResurrectionConfig(**TRIAL))
    budget_start: float = 0.05
    budget_end: float = 0.0
    margin_end: float | None = None
    densify: Densification | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    autocast: Literal["bfloat16", "float16"] | None = None
    evaluate_every: int | None = None
    log_every: int = 10
    early_stop: EarlyStop | None = None
    checkpoint: CheckpointConfig | None = None
    stats: str | None = None
    seed: int = 0
    compile: bool = True

    def __post_init__(self) -> None:
        """Check every field and that a plan can be made of them."""
        settle_method(self)
        for name in ("steps", "cycles", "accumulate", "log_every"):
            check_integer(getattr(self, name), name=name, minimum=1)
        for name in ("recovery", "initial_sparsity"):
            check_share(getattr(self, name), name=name)
        if self.warmup is not None:
            check_share(self.warmup, name="warmup")
        object.__setattr__(self, "sparsity", self.sparsity_config().sparsity)
        self._check_pattern()
        _check_type(self.cycle, CycleShares, "cycle")
        _check_type(self.resurrection, ResurrectionConfig, "resurrection")
        for name in ("budget_start", "budget_end"):
            check_number(getattr(self, name), name=name, minimum=0.0, maximum=1.0)
        if self.margin_end is not None:
            check_number(
                self.margin_end,
                name="margin_end",
                minimum=0.0,
                expected="None or a number >= 0",
            )
            if self.resurrection.kind != "ceiling":
                raise ArgumentError(
                    "margin_end: expected None unless resurrection.kind is 'ceiling', which alone "
                    f"has a margin, got {self.margin_end!r}"
                )
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        if isinstance(self.exclude, list):
            object.__setattr__(self, "exclude", tuple(self.exclude))
        schedule = self.schedule
        if self.densify is not None:
            _check_type(self.densify, Densification, "densify")
            self.densify.check(cycles=self.cycles, final=self.sparsity)
            if self.cycle.resu == 0.0:
                raise ArgumentError("cycle.resu: expected more than 0 with densify, got 0")
        else:
            schedule = check_schedule(schedule, cycles=self.cycles, final=self.sparsity)
        object.__setattr__(self, "schedule", schedule)
        self._check_overrides()
        if self.clip_norm is not None:
            check_number(self.clip_norm, name="clip_norm", minimum=0.0)
        if self.autocast is not None:
            check_choice(self.autocast, ("bfloat16", "float16"), name="autocast")
        if self.evaluate_every is not None:
            check_integer(self.evaluate_every, name="evaluate_every", minimum=1)
        if self.early_stop is not None:
            _check_type(self.early_stop, EarlyStop, "early_stop")
            if self.evaluate_every is None:
                raise ArgumentError(
                    "evaluate_every: expected a number of steps with early_stop, which looks at "
                    "evaluations, got None"
                )
        if self.checkpoint is not None:
            _check_type(self.checkpoint, CheckpointConfig, "checkpoint")
        if self.stats is not None:
            if not isinstance(self.stats, (str, Path)):
                raise ArgumentTypeError(f"stats: expected a path, got {self.stats!r}")
            object.__setattr__(self, "stats", str(self.stats))
        check_flag(self.compile, name="compile")
        if self.has_cycles:
            self._check_plan()

    @property
    def has_cycles(self) -> bool:
        """Whether the run consists of the cycles of RESU."""
        return not is_training_method(self.method) or isinstance(self.training_method(), Resu)

    def training_method(self) -> TrainingMethod:
        """The training method; that of RESU's cycles if ``method`` names none."""
        if is_training_method(self.method):
            return get_training_method(self.method, **self.method_options)  # type: ignore[arg-type]
        return Resu(self.method)  # type: ignore[arg-type]

    def _check_plan(self) -> None:
        first = build_plan(self)[0]
        method = self.training_method()
        assert isinstance(method, Resu)
        if self.resurrection.strategy == "open" and is_calibrated(method.criterion):
            raise ArgumentError(
                "resurrection.strategy: expected another one than 'open' with "
                f"method={method.criterion!r}, which measures masks and gives no scores, got "
                "'open'; resurrection={'strategy': 'reprune'} prunes by it each time"
            )
        if first.sparsity > 0.0 and is_gradient_method(method.criterion):
            raise ArgumentError(
                f"warmup: expected more than 0 with method={method.criterion!r}, which scores by "
                f"the gradients of dense steps, got {self.warmup!r}; 'magnitude' prunes at once"
            )

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        if not self.training_method().keeps_pattern:
            raise ArgumentError(
                f"pattern: expected None with method={self.method!r}, whose masks have none, got "
                f"{self.pattern!r}; 'sr_ste' trains with a pattern, and 'rigl' keeps one"
            )
        ramps = (("schedule", "constant"),) if self.has_cycles else ()
        for name, plain in (*ramps, ("initial_sparsity", 0.0), ("densify", None)):
            if getattr(self, name) != plain:
                raise ArgumentError(
                    f"{name}: expected {plain!r} with pattern={self.pattern!r}, which has one "
                    f"sparsity only, got {getattr(self, name)!r}"
                )

    def _check_overrides(self) -> None:
        path = (self.initial_sparsity, *cycle_sparsities(self))
        if self.overrides and any(after < before for before, after in pairwise(path)):
            raise ArgumentError(
                f"overrides: expected none with a sparsity that falls, got {dict(self.overrides)}; "
                "exclude= leaves a weight dense"
            )

    def sparsity_config(self) -> SparsityConfig:
        """What ``sparsify`` goes by at the final sparsity."""
        return SparsityConfig(
            sparsity=self.sparsity,
            method="magnitude" if is_training_method(self.method) else self.method,  # type: ignore[arg-type]
            scope=self.scope,
            distribution=self.distribution,
            targets=self.targets,
            exclude=self.exclude,
            overrides=self.overrides,
            min_density=self.min_density,
            pattern=self.pattern,
            seed=self.seed,
        )

    # -- as data -------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """Plain data, which JSON and YAML can hold and ``from_dict`` takes back.

        Raises:
            ArgumentError: a field holds a function or an object (a schedule, a score, a method, a
                predicate); those are no data.
        """
        found: dict[str, Any] = to_plain(self, _DATA)
        return found

    def describe(self) -> dict[str, Any]:
        """``to_dict``, with the name of each function or class in its place; for records."""
        found: dict[str, Any] = to_plain(self, _DATA, strict=False)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingConfig:
        """The config that ``to_dict`` or a hand-written file describes.

        Args:
            data: field -> value; missing fields take their defaults. The key ``preset`` names the
                preset that they change instead. A mapping ``resurrection`` or ``cycle`` changes the
                fields that it names, and leaves the others as the default or the preset gives them;
                a ``ResurrectionConfig`` or ``CycleShares`` stays whole.

        Raises:
            ArgumentError: an unknown key, or a value that the fields do not take.
        """
        if not isinstance(data, Mapping):
            raise ArgumentTypeError(f"config: expected a mapping of settings, got {data!r}")
        values = dict(data)
        name = values.pop("preset", None)
        check_known_keys(values, {f.name for f in fields(cls)} | {"preset"}, what="setting")
        from resu_compile.training.presets import preset_fields

        values = over(preset_fields("default" if name is None else name), values)
        for key, kind in _PARTS.items():
            if isinstance(values.get(key), Mapping):
                values[key] = from_plain(kind, values[key], key)
        return cls(**values)

    def dump(self, path: str | Path) -> None:
        """Write the config to a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ArgumentError: another suffix, or a field that is no data.
        """
        write_data(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> TrainingConfig:
        """The config in a ``.yaml``, ``.yml`` or ``.json`` file.

        Raises:
            ArgumentError: another suffix, a file that is no such text, or an unknown setting.
        """
        return cls.from_dict(read_data(path))


_PARTS: dict[str, type[Any]] = {
    "cycle": CycleShares,
    "resurrection": ResurrectionConfig,
    "densify": Densification,
    "early_stop": EarlyStop,
    "checkpoint": CheckpointConfig,
}
_DATA = (
    TrainingConfig,
    CycleShares,
    ResurrectionConfig,
    Densification,
    Pause,
    EarlyStop,
    CheckpointConfig,
)


def _check_type(value: object, kind: type[Any], name: str) -> None:
    if not isinstance(value, kind):
        raise ArgumentTypeError(f"{name}: expected a {kind.__name__}, got {value!r}")
