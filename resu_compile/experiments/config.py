"""What an experiment compares, as frozen dataclasses that a YAML or JSON file fills.

    tasks x methods x sparsities x seeds x lengths

All cells of a task share data order, initial weights, optimizer and learning rate of their seed;
methods differ in their masks alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_integer,
    check_known_keys,
    check_number,
    check_share,
)
from resu_compile.experiments.search import check_space, values_of
from resu_compile.experiments.settings import DENSE, TRAINING, training_config
from resu_compile.training.config import over
from resu_compile.training.serialization import from_plain, read_data

# what cells set themselves, what leaves no sparse model, and what ends runs at unequal steps
NOT_HERE = (
    "seed",
    "steps",
    "sparsity",
    "stats",
    "checkpoint",
    "method",
    "method_options",
    "densify",
    "early_stop",
)


@dataclass(frozen=True)
class TaskSpec:
    """A task of the experiment.

    Attributes:
        name: one of ``experiments.tasks.task_names()``, or ``"module:function"`` of your own.
        steps: optimizer steps of a run of length 1.
        label: what results call it; the name by default.
        options: keyword arguments of the task.
        checkpoint_every: optimizer steps between two checkpoints of a run; None writes none, so
            that an interrupted run begins again.
    """

    name: str
    steps: int
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        _settle_label(self, "task")
        check_integer(self.steps, name=f"steps of task {self.label}", minimum=1)
        _check_mapping(self.options, f"options of task {self.label}")
        if self.checkpoint_every is not None:
            check_integer(self.checkpoint_every, name="checkpoint_every", minimum=1)


@dataclass(frozen=True)
class MethodSpec:
    """A method with its settings, and those that are searched.

    Attributes:
        name: a training method, ``"module:Class"`` of your own, or ``"dense"``.
        label: what results call it; the name by default. Two settings of one method need two.
        options: fields of the method.
        training: fields of ``TrainingConfig`` (those of RESU's cycles, a distribution, ...);
            ``preset`` names a preset that they change.
        search: setting -> its values, or ``{low, high, log}``. Fields of ``TrainingConfig`` begin
            with ``training.``; all others are fields of the method.
    """

    name: str
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        _settle_label(self, "method")
        for name in ("options", "training", "search"):
            _check_mapping(getattr(self, name), f"{name} of method {self.label}")
        _check_training(self.training, f"training of method {self.label}")
        if self.name == DENSE and (self.options or self.training or self.search):
            raise ArgumentError("method dense: expected no settings, which dense training has not")
        check_space(self.search, where=f"search of method {self.label}")
        searched = {
            name.removeprefix(TRAINING).partition(".")[0]: values
            for name, values in self.search.items()
            if name.startswith(TRAINING)
        }
        _check_training(searched, f"search of method {self.label}, {TRAINING[:-1]}")


@dataclass(frozen=True)
class Tuning:
    """The budget that every method has for its own settings, the same for all.

    The first trial has the method's settings as they are; the others are drawn from its search
    space. Each trains at length ``length`` with ``seed`` and is judged by the validation split.

    Attributes:
        trials: for each (task, method, sparsity); 0 does not tune.
        seed: of the trials; none of the reported seeds.
        strategy: ``"random"`` or ``"grid"``; both are the same in every process.
        length: of the trials, in runs of length 1.
    """

    trials: int = 0
    seed: int = 1000
    strategy: Literal["random", "grid"] = "random"
    length: float = 1.0

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_integer(self.trials, name="tuning.trials")
        check_integer(self.seed, name="tuning.seed")
        check_choice(self.strategy, ("random", "grid"), name="tuning.strategy")
        _check_length(self.length, "tuning.length")


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment.

    Attributes:
        tasks: what is learned.
        methods: what is compared.
        sparsities: final ones, in (0, 1).
        seeds: of the reported runs.
        lengths: of the reported runs, in runs of length 1.
        budget: ``"steps"`` gives each method ``length * steps`` optimizer steps; ``"flops"`` as
            many steps as cost what dense training of so many costs.
        max_stretch: with ``"flops"``, most steps of a run, relative to dense training, >= 1.
        tuning: of each method's settings.
        training: fields of ``TrainingConfig`` that all runs have (``compile``, ``clip_norm``, ...).
        output: folder of results, claims and checkpoints.
        wandb: Weights & Biases project that the runs are logged to; None logs to none.
    """

    tasks: tuple[TaskSpec, ...]
    methods: tuple[MethodSpec, ...]
    sparsities: tuple[float, ...]
    seeds: tuple[int, ...] = (0,)
    lengths: tuple[float, ...] = (1.0,)
    budget: Literal["steps", "flops"] = "steps"
    max_stretch: float = 5.0
    tuning: Tuning = field(default_factory=Tuning)
    training: Mapping[str, Any] = field(default_factory=dict)
    output: Path = Path("experiment_output")
    wandb: str | None = None

    def __post_init__(self) -> None:
        """Check every field, and that each cell's training can be configured."""
        for name in ("tasks", "methods"):
            labels = [spec.label for spec in getattr(self, name)]
            if not labels:
                raise ArgumentError(f"{name}: expected at least one, got none")
            _check_once(labels, name)
        for name in ("sparsities", "seeds", "lengths"):
            _check_once(getattr(self, name), name)
        for sparsity in self.sparsities:
            if check_share(sparsity, name="sparsities") == 0.0:
                raise ArgumentError("sparsities: expected numbers in (0, 1), got 0")
        for seed in self.seeds:
            check_integer(seed, name="seeds")
        for length in self.lengths:
            _check_length(length, "lengths")
        check_choice(self.budget, ("steps", "flops"), name="budget")
        check_number(self.max_stretch, name="max_stretch", minimum=1.0)
        if self.tuning.trials and self.tuning.seed in self.seeds:
            raise ArgumentError(
                f"tuning.seed: expected none of the reported seeds, got {self.tuning.seed}, whose "
                "run would be reported with settings that were chosen by it"
            )
        _check_training(self.training, "training")
        if not self.sparsities and any(method.name != DENSE for method in self.methods):
            raise ArgumentError("sparsities: expected at least one, got none")
        self._check_methods()

    def _check_methods(self) -> None:
        """Build the training of each cell, and of each value in a search, before hours of work."""
        for task in self.tasks:
            for method in self.methods:
                for sparsity in self.sparsities or (0.0,):
                    self._check_cell(task, method, sparsity, {})
                if self.sparsities:
                    for name, values in method.search.items():
                        for value in values_of(values):
                            self._check_cell(task, method, self.sparsities[0], {name: value})

    def _check_cell(
        self, task: TaskSpec, method: MethodSpec, sparsity: float, settings: Mapping[str, Any]
    ) -> None:
        training_config(
            method.name,
            steps=max(1, round(task.steps * min(self.lengths, default=1.0))),
            sparsity=sparsity,
            seed=0,
            options=method.options,
            training=self.training_of(method),
            settings=settings,
        )

    def training_of(self, method: MethodSpec) -> dict[str, Any]:
        """The fields of ``TrainingConfig`` that are set for ``method``: its own over those of all.

        Where both have a mapping ``resurrection`` or ``cycle``, the method's changes the fields
        that it names.
        """
        return over(self.training, method.training)

    @property
    def results(self) -> Path:
        """The results file."""
        return self.output / "results.jsonl"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExperimentConfig:
        """The experiment that plain data describe.

        Raises:
            ArgumentError: an unknown key, or a value that a field does not take.
        """
        if not isinstance(data, Mapping):
            raise ArgumentTypeError(f"experiment: expected a mapping of settings, got {data!r}")
        check_known_keys(data, [f.name for f in fields(cls)], what="key of the experiment:")
        values = dict(data)
        for name in ("tasks", "methods", "sparsities", "seeds", "lengths"):
            if name in values:
                values[name] = tuple(_list(values[name], name))
        for name in ("tasks", "methods", "sparsities"):
            if name not in values:
                raise ArgumentError(f"{name}: expected a list, got none")
        values["tasks"] = tuple(_spec(TaskSpec, entry, "tasks") for entry in values["tasks"])
        values["methods"] = tuple(
            _spec(MethodSpec, {"name": entry} if isinstance(entry, str) else entry, "methods")
            for entry in values["methods"]
        )
        if "tuning" in values:
            values["tuning"] = from_plain(Tuning, values["tuning"], "tuning")
        if "output" in values:
            values["output"] = Path(values["output"])
        _check_mapping(values.get("training", {}), "training")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> ExperimentConfig:
        """The experiment in a ``.yaml``, ``.yml`` or ``.json`` file."""
        return cls.from_dict(read_data(path))


# -- checks ------------------------------------------------------------------------------------
def _spec(kind: type[Any], entry: object, where: str) -> Any:
    return from_plain(kind, entry, where)


def _settle_label(spec: TaskSpec | MethodSpec, what: str) -> None:
    if not isinstance(spec.name, str) or not spec.name:
        raise ArgumentTypeError(f"name of a {what}: expected a name, got {spec.name!r}")
    label = spec.label or spec.name.replace(":", ".")
    if not isinstance(label, str) or not label.replace("_", "").replace(".", "").isalnum():
        raise ArgumentError(
            f"label of {what} {spec.name}: expected letters, digits, '_' and '.', got {label!r}"
        )
    object.__setattr__(spec, "label", label)


def _check_mapping(value: object, name: str) -> None:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ArgumentTypeError(f"{name}: expected a mapping of names to values, got {value!r}")


def _check_training(training: Mapping[str, Any], where: str) -> None:
    for key in sorted(set(training) & set(NOT_HERE)):
        raise ArgumentError(
            f"{where}: expected no {key!r}, got {training[key]!r}; tasks, methods, sparsities and "
            "seeds say what is trained, and all runs go to their end"
        )


def _check_once(values: Sequence[Any], name: str) -> None:
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        raise ArgumentError(f"{name}: expected each once, got {twice[0]!r} twice")


def _check_length(value: object, name: str) -> None:
    if check_number(value, name=name, minimum=0.0) == 0.0:
        raise ArgumentError(f"{name}: expected numbers above 0, got 0")


def _list(value: object, name: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise ArgumentTypeError(f"{name}: expected a list, got {value!r}")
    return value
