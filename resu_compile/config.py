"""What a user may choose, as frozen dataclasses that are checked when built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

from torch import Tensor

from resu_compile.comparison import parse_pattern
from resu_compile.distributions import DISTRIBUTIONS
from resu_compile.errors import (
    ArgumentError,
    ArgumentTypeError,
    check_choice,
    check_flag,
    check_known_keys,
    check_number,
    check_share,
    check_sparsity,
)
from resu_compile.methods import AnyMethod, get_method, is_calibrated

Names = str | tuple[str, ...]
Predicate = Callable[[str, Tensor], bool]

RULES = ("auto", "optimizer", "sgd", "momentum", "adam", "selective", "subset")
SCORES = ("magnitude", "saliency", "gradient", "growth", "wanda")
STRATEGIES = ("amnesty", "open", "merge", "reprune")
DEFAULT_SPARSITY = 0.7
DEFAULT_EXCLUDE: tuple[str, ...] = ("*lm_head*",)


def _check_selector(value: object, name: str) -> Names | Predicate | None:
    if value is None or isinstance(value, str):
        return value
    if callable(value):
        return cast("Predicate", value)
    if isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise ArgumentTypeError(
        f"{name}: expected a name, a glob, a sequence of them, or a predicate "
        f"(name, parameter) -> bool; got {value!r}"
    )


@dataclass(frozen=True)
class SparsityConfig:
    """Which weights are pruned, how much and by what.

    Attributes:
        sparsity: overall share of pruned weights, in [0, 1); None is 0.7, or 1 - N/M of a pattern.
        method: name of a registered method, an object with ``score(weight, generator)``, or a
            calibrated one, with ``prune(block)``.
        scope: ``"layer"`` ranks inside each weight; ``"global"`` over all weights with one
            threshold.
        distribution: how ``sparsity`` is spread with ``scope="layer"``: ``"uniform"``,
            ``"er"`` or ``"erk"``.
        targets: names, globs or a predicate that choose among the matmul and convolution weights;
            None means all of them. A parameter's own full name also takes what is left dense by
            default (an embedding, a norm, a bias, a head).
        exclude: names, globs or a predicate of the parameters to leave dense.
        overrides: name or glob -> sparsity of those weights; the last match wins.
        min_density: least share of a weight that ``scope="global"`` and ``distribution="erk"``
            leave active, so that no layer dies (but never more than 1 - ``sparsity``). The global
            total stays exact; ERK then keeps a little more. A sparsity asked for by number
            (uniform, or in ``overrides``) is taken as it is.
        tied: ``"skip"`` leaves a parameter that has several names dense; ``"mask_all"`` masks it
            once, under its first name; ties to an embedding stay dense unless targeted by name.
        from_zeros: adopt the zeros that the weights already have; no value changes and
            ``sparsity`` becomes the share that was found.
        seed: seed of the controller's own random generator.
        pattern: ``"N:M"`` keeps the best N of each M consecutive inputs of an output; None lets
            each weight be sparse anywhere.
    """

    sparsity: float = cast("float", None)  # it is a number once the config is built
    method: str | AnyMethod = "magnitude"
    scope: Literal["layer", "global"] = "layer"
    distribution: Literal["uniform", "er", "erk"] = "uniform"
    targets: Names | Predicate | None = None
    exclude: Names | Predicate | None = DEFAULT_EXCLUDE
    overrides: Mapping[str, float] = field(default_factory=dict)
    min_density: float = 0.01
    tied: Literal["skip", "mask_all"] = "skip"
    from_zeros: bool = False
    seed: int = 0
    pattern: str | None = None

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        get_method(self.method)
        self._settle_sparsity()
        check_choice(self.scope, ("layer", "global"), name="scope")
        check_choice(self.distribution, DISTRIBUTIONS, name="distribution")
        check_choice(self.tied, ("skip", "mask_all"), name="tied")
        check_number(self.min_density, name="min_density", minimum=0.0, maximum=1.0)
        if self.scope == "global" and self.distribution != "uniform":
            raise ArgumentError(
                f"distribution: expected 'uniform' with scope='global' (one threshold decides "
                f"the layers), got {self.distribution!r}"
            )
        object.__setattr__(self, "targets", _check_selector(self.targets, "targets"))
        object.__setattr__(self, "exclude", _check_selector(self.exclude, "exclude"))
        if not isinstance(self.overrides, Mapping):
            raise ArgumentTypeError(
                f"overrides: expected a mapping from name or glob to sparsity, "
                f"got {self.overrides!r}"
            )
        for pattern, value in self.overrides.items():
            if not isinstance(pattern, str):
                raise ArgumentTypeError(f"overrides: expected names or globs, got {pattern!r}")
            check_share(value, name=f"overrides[{pattern!r}]")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ArgumentTypeError(f"seed: expected an int, got {self.seed!r}")
        if not isinstance(self.from_zeros, bool):
            raise ArgumentTypeError(f"from_zeros: expected a bool, got {self.from_zeros!r}")

    def _settle_sparsity(self) -> None:
        """The sparsity of the pattern if there is one, else the default, unless it was given."""
        if self.pattern is None:
            given = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
            object.__setattr__(self, "sparsity", check_sparsity(given))
        else:
            wanted = parse_pattern(self.pattern).sparsity
            given = wanted if self.sparsity is None else check_sparsity(self.sparsity)
            if abs(given - wanted) > 1e-6:  # 2/3 is not 1 - 1/3 to the bit
                raise ArgumentError(
                    f"sparsity: expected None or {wanted:g} with pattern={self.pattern!r}, which "
                    f"decides it, got {self.sparsity!r}; pattern=None takes any sparsity"
                )
            object.__setattr__(self, "sparsity", wanted)
            for name, plain in (("scope", "layer"), ("distribution", "uniform"), ("overrides", {})):
                if getattr(self, name) != plain:
                    raise ArgumentError(
                        f"{name}: expected {plain!r} with pattern={self.pattern!r}, which decides "
                        f"what each weight keeps, got {getattr(self, name)!r}"
                    )
            if self.from_zeros is True:
                raise ArgumentError(
                    f"from_zeros: expected False with pattern={self.pattern!r}, which decides the "
                    "masks; prune again with a pattern after adopting the zeros"
                )
        if self.scope == "global" and is_calibrated(self.method):
            raise ArgumentError(
                f"scope: expected 'layer' with method={self.method!r}, which compares the weights "
                "of one output, got 'global'"
            )

    def without_predicates(self) -> SparsityConfig:
        """The same without functions, which a pickle may not hold; they only mattered once."""
        return replace(
            self,
            targets=None if callable(self.targets) else self.targets,
            exclude=None if callable(self.exclude) else self.exclude,
        )


@dataclass(frozen=True)
class CompileConfig:
    """How graphs are compiled.

    Attributes:
        sparse_threshold: ``"auto"`` takes the sparse kernel where it measured faster; a number in
            [0, 1] takes it from that sparsity on; 1.0 turns it off.
        mode: ``torch.compile`` mode, passed on to Inductor.
        inductor_options: Inductor settings (``torch._inductor.list_options()``), passed on.
        release_dense: free the dense storage of weights that only sparse kernels read, at the first
            compiled call without gradients; the model is for inference then.
    """

    sparse_threshold: float | Literal["auto"] = "auto"
    mode: str | None = None
    inductor_options: Mapping[str, Any] = field(default_factory=dict)
    release_dense: bool = False

    def __post_init__(self) -> None:
        """Check what is ours; Inductor's options are checked against its own list."""
        if not isinstance(self.release_dense, bool):
            raise ArgumentTypeError(f"release_dense: expected a bool, got {self.release_dense!r}")
        if self.sparse_threshold != "auto":
            check_number(
                self.sparse_threshold,
                name="sparse_threshold",
                minimum=0.0,
                maximum=1.0,
                expected="'auto' or a number in [0, 1]",
            )


@dataclass(frozen=True)
class ResurrectionConfig:
    """How theta is trained in the RESU phase, and how the phase is committed.

    Attributes:
        lr: step size of theta; None follows the learning rate of the optimizer's own parameter
            group at each step.
        rule: ``"sgd"``, ``"momentum"``, ``"adam"``, ``"selective"`` and ``"subset"`` give theta a
            step of its own (formulas in ``runtime/rules.py``); ``"optimizer"`` leaves theta to the
            user's optimizer. ``"auto"`` is ``"optimizer"``, which costs no time and no memory,
            unless ``lr`` is given, the active weights are frozen or the storage is compact: then
            ``"adam"``.
        storage: ``"inplace"`` keeps theta in the pruned places of the weight and what the rule
            remembers in the pruned places of the optimizer's own state, where it has such;
            ``"compact"`` keeps both as vectors of one number a pruned place, theta in at least
            float32, so that dropping them leaves no trace. The numbers are the same.
        init: ``"zero"``, ``"normal"`` N(0, (eps sigma_A)^2) or ``"uniform"`` on
            [-eps sigma_A, eps sigma_A]; sigma_A is the standard deviation of the active weights.
        eps: scale of ``init``, relative to sigma_A.
        freeze_active: True keeps the active weights bit-exactly where they are (no gradient,
            momentum or weight decay); False trains both.
        freeze: ``"active"`` is ``freeze_active=True``; ``"all"`` keeps every parameter of the model
            where it is but theta, biases and embeddings too; None follows ``freeze_active``.
        step: what ``"selective"`` and ``"subset"`` multiply the learning rate by: ``"adam"`` an
            adaptive step, ``"raw"`` the gradient, as published; the raw one hardly moves theta at
            the learning rates of adaptive optimizers.
        betas: decay rates of the means, in [0, 1); ``"selective"`` uses the first for both.
        adam_eps: term added to the denominator of the Adam rule.
        momentum: of the momentum rule, in [0, 1).
        weight_decay: decoupled decay of theta, per unit of learning rate.
        screen: ``"selective"``: share of the pruned places with the largest |g| that are looked at.
        select: ``"selective"``: largest share of the pruned places that moves in a step.
        tau: ``"selective"``: least consistency |m| / (v + delta) of what moves, in [0, 1).
        delta: ``"selective"``: term added to the denominator of the consistency.
        alpha: ``"subset"``: share of the pruned places that moves.
        subset_by: ``"subset"``: ``"random"`` draws it, ``"gradient"`` takes the largest |g|.
        refresh: ``"subset"``: steps after which it is chosen again; 0 keeps it all phase long.
        hidden: True keeps theta out of forward passes, which see 0 at the pruned places. Gradients
            reach these all the same, straight through the mask, and theta goes by them; it costs
            one copy of each weight. ``Cycle`` then lets theta of those that are not resurrected go
            on in the next cycle, where that begins with a resurrection.
        places: how many pruned places hold theta, as a share of the places that are kept: those
            with the largest |g| of the first step, which computes a dense gradient for it. The
            others stay 0. None lets all of them hold theta.
        budget: share of the kept places that the tournament reserves for the resurrected.
        score: ``"magnitude"`` |W|; ``"gradient"`` |W| |g|, g the gradient of the last step;
            ``"saliency"`` |W| (E[g^2])^(1/4), with ``controller(model).track_gradients()``;
            ``"growth"`` |W| of the active and |g| of the pruned, for a quota, whose groups do not
            meet; ``"wanda"`` |W| times the norm of its input, which ``commit(calibration=...)``
            measures; or a callable (name, weight) -> score tensor.
        strategy: ``"amnesty"``, ``"open"``, ``"merge"`` or ``"reprune"``; each keeps an N:M pattern
            (docs/resurrection.md).
        kind: of ``"amnesty"``: ``"quota"`` gives the resurrected all places of the budget, whatever
            they score, as published; ``"ceiling"`` at most these, and each only to one whose score
            is over (1 + ``margin``) times that of the active one it displaces.
        margin: of ``"ceiling"``, >= 0; 0 asks for a higher score and nothing more.

    The defaults start theta from zero and train it along with the active weights: freezing them
    costs training time, and noise at the start is what would then be resurrected.
    """

    lr: float | None = None
    rule: Literal["auto", "optimizer", "sgd", "momentum", "adam", "selective", "subset"] = "auto"
    storage: Literal["inplace", "compact"] = "inplace"
    init: Literal["zero", "normal", "uniform"] = "zero"
    eps: float = 0.1
    freeze_active: bool = False
    freeze: Literal["active", "all"] | None = None
    step: Literal["raw", "adam"] = "adam"
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    momentum: float = 0.9
    weight_decay: float = 0.0
    screen: float = 0.5
    select: float = 0.2
    tau: float = 0.5
    delta: float = 1e-8
    alpha: float = 0.2
    subset_by: Literal["random", "gradient"] = "random"
    refresh: int = 0
    hidden: bool = False
    places: float | None = None
    budget: float = 0.02
    score: str | Callable[[str, Tensor], Tensor] = "magnitude"
    strategy: Literal["amnesty", "open", "merge", "reprune"] = "amnesty"
    kind: Literal["quota", "ceiling"] = "quota"
    margin: float = 0.0

    def __post_init__(self) -> None:
        """Check every field; the messages name the argument."""
        check_choice(self.rule, RULES, name="rule")
        check_choice(self.storage, ("inplace", "compact"), name="storage")
        check_choice(self.init, ("zero", "normal", "uniform"), name="init")
        check_choice(self.step, ("raw", "adam"), name="step")
        check_choice(self.subset_by, ("random", "gradient"), name="subset_by")
        if self.lr is not None:
            check_number(self.lr, name="lr", minimum=0.0, expected="None or a number >= 0")
        check_number(self.weight_decay, name="weight_decay", minimum=0.0)
        if check_number(self.delta, name="delta", minimum=0.0) == 0.0:
            raise ArgumentError("delta: expected a number > 0, because 0 / 0 is NaN, got 0")
        for name in ("screen", "select", "alpha"):
            check_number(getattr(self, name), name=name, minimum=0.0, maximum=1.0)
        check_share(self.tau, name="tau")
        if isinstance(self.refresh, bool) or not isinstance(self.refresh, int) or self.refresh < 0:
            raise ArgumentError(f"refresh: expected a number of steps >= 0, got {self.refresh!r}")
        check_number(self.eps, name="eps", minimum=0.0)
        check_number(self.adam_eps, name="adam_eps", minimum=0.0)
        check_share(self.momentum, name="momentum")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ArgumentError(f"betas: expected two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            check_share(beta, name="betas")
        object.__setattr__(self, "betas", tuple(self.betas))
        self._settle_freeze()
        self._settle_rule()
        self._check_hidden()
        self._check_places()
        check_commit(self.budget, self.score, self.strategy, self.kind, self.margin)
        if self.score == "gradient" and self.freeze_active:
            raise ArgumentError(
                "score: expected another one than 'gradient' with frozen active weights, which get "
                "no gradient to be scored by; set freeze_active=False or score='magnitude'"
            )

    def _check_hidden(self) -> None:
        check_flag(self.hidden, name="hidden")
        for name, plain in (("storage", "inplace"), ("places", None)):
            if self.hidden and getattr(self, name) != plain:
                raise ArgumentError(
                    f"{name}: expected {plain!r} with hidden=True, which keeps theta of all pruned "
                    f"places beside the weights, got {getattr(self, name)!r}; set hidden=False "
                    "('hidden: false' in a file)"
                )

    def _check_places(self) -> None:
        if self.places is None:
            return
        check_number(self.places, name="places", minimum=0.0, expected="None or a number >= 0")
        if self.init != "zero" or self.rule in ("selective", "subset"):
            raise ArgumentError(
                "places: expected None unless theta starts from zero and moves by another rule "
                "than 'selective' and 'subset', which choose places of their own, got "
                f"places={self.places!r} with init={self.init!r} and rule={self.rule!r}; set "
                "places=None ('places: null' in a file), or init='zero' and another rule"
            )

    def _settle_freeze(self) -> None:
        if not isinstance(self.freeze_active, bool):
            raise ArgumentTypeError(f"freeze_active: expected a bool, got {self.freeze_active!r}")
        if self.freeze is None:
            return
        check_choice(self.freeze, ("active", "all"), name="freeze")
        object.__setattr__(self, "freeze_active", True)

    def _settle_rule(self) -> None:
        if self.rule == "auto":
            own_step = self.lr is not None or self.freeze_active or self.storage == "compact"
            object.__setattr__(self, "rule", "adam" if own_step else "optimizer")
        if self.rule == "optimizer" and self.lr is not None:
            raise ArgumentError(
                f"lr: expected None with rule='optimizer' (the optimizer has its own), "
                f"got {self.lr!r}; set lr=None ('lr: null' in a file), or rule='adam'"
            )
        if self.rule == "optimizer" and self.storage == "compact":
            raise ArgumentError(
                "storage: expected 'inplace' with rule='optimizer', which trains the weight "
                "itself, got 'compact'; choose another rule, 'adam' say"
            )


def check_commit(
    budget: object, score: object, strategy: object, kind: object = "quota", margin: object = 0.0
) -> None:
    """Check the arguments of a commit."""
    check_number(budget, name="budget", minimum=0.0, maximum=1.0)
    check_choice(strategy, STRATEGIES, name="strategy")
    check_choice(kind, ("quota", "ceiling"), name="kind")
    check_number(margin, name="margin", minimum=0.0, expected="a number >= 0")
    if not callable(score):
        check_choice(score, SCORES, name="score")
    if score == "growth" and (kind != "quota" or strategy != "amnesty"):
        raise ArgumentError(
            "score: expected another one than 'growth' unless strategy='amnesty' and kind='quota', "
            "because it measures active and pruned in different units, got "
            f"strategy={strategy!r} and kind={kind!r}; set these two, or another score"
        )


def split_options(options: Mapping[str, Any]) -> tuple[SparsityConfig, CompileConfig]:
    """Configs from the ``options`` of ``torch.compile(backend="resu", options=...)``.

    Raises:
        ArgumentError: for an option that neither this package nor Inductor knows; the message
            lists those of this package.
    """
    own = {f.name for f in fields(SparsityConfig)}
    inductor: dict[str, Any] = {}
    unknown: list[str] = []
    known_to_inductor = inductor_option_names()
    for key, value in options.items():
        if key in own or key in ("sparse_threshold", "mode", "release_dense"):
            continue
        if key.replace("-", "_") in known_to_inductor:
            inductor[key.replace("-", "_")] = value
        else:
            unknown.append(key)
    check_known_keys(unknown, own | {"sparse_threshold", "release_dense"}, what="option")
    sparsity = SparsityConfig(**{k: v for k, v in options.items() if k in own})
    threshold = options.get("sparse_threshold", "auto")
    release = options.get("release_dense", False)
    return sparsity, CompileConfig(threshold, options.get("mode"), inductor, release)


def inductor_option_names() -> set[str]:
    """The settings that Inductor accepts as ``options``."""
    from torch._inductor import list_options

    return set(list_options())
