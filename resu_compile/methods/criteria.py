"""Scores of places: which to drop (the lowest of the active), which to grow (the highest others).

    magnitude           |w|
    gradient            |g|
    taylor              |w g|
    weight_and_gradient |w| + coefficient |g|
    momentum            |m|
    adam_momentum       |m| / (sqrt(v) + 1e-8)
    saliency            |w| v^(1/4)
    random              uniform in [0, 1)

One dict, so that any method takes any of them for either end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from resu_compile.errors import ArgumentError, check_choice, check_number
from resu_compile.methods.saliency import Saliency

Needs = Literal["nothing", "gradient", "momentum", "moments"]  # moments: and mean squares


@dataclass(frozen=True)
class Places:
    """All that a score may look at: one weight and what belongs to its places.

    Attributes:
        name: of the parameter.
        weight: its value, 0 at pruned places unless they keep values.
        mask: bool, shape of ``weight``, True = active.
        generator: CPU generator, the only source of randomness.
        gradient: that of this step; at pruned places only if the method asked for it.
        mean: decaying mean of gradients, shape of ``weight``.
        square: decaying mean of squared gradients.
        fill: under an N:M pattern, ``fill(kept, score)`` is the mask with the kept places and, in
            each group, the highest scores of the others.
    """

    name: str
    weight: Tensor
    mask: Tensor
    generator: torch.Generator
    gradient: Tensor | None = None
    mean: Tensor | None = None
    square: Tensor | None = None
    fill: Callable[[Tensor, Tensor], Tensor] | None = None


@runtime_checkable
class Criterion(Protocol):
    """A score of places."""

    @property
    def needs(self) -> Needs:
        """What has to be known beside the weight."""
        ...

    def score(self, places: Places) -> Tensor:
        """Floating point, shape of the weight, free of NaN; the higher, the more it is wanted."""
        ...


def _known(value: Tensor | None, places: Places, what: str) -> Tensor:
    if value is None:
        raise ArgumentError(
            f"criterion: expected the {what} of {places.name} to be known, got None; "
            "SparseTraining provides it if after_backward() is called before optimizer.step()"
        )
    return value


@dataclass(frozen=True)
class ByMagnitude:
    """|w|."""

    needs: ClassVar[Needs] = "nothing"

    def score(self, places: Places) -> Tensor:
        """|w|."""
        return places.weight.abs()


@dataclass(frozen=True)
class ByGradient:
    """|g|.

    Source: Evci et al. 2020 (RigL), https://arxiv.org/abs/1911.11134
    """

    needs: ClassVar[Needs] = "gradient"

    def score(self, places: Places) -> Tensor:
        """|g|."""
        return _known(places.gradient, places, "gradient").abs()


@dataclass(frozen=True)
class ByTaylor:
    """|w g|, to first order what the loss changes by if the weight goes.

    Source: Lee et al. 2019 (SNIP), https://arxiv.org/abs/1810.02340
    """

    needs: ClassVar[Needs] = "gradient"

    def score(self, places: Places) -> Tensor:
        """|w g|, in float32 or wider."""
        gradient = _known(places.gradient, places, "gradient")
        wide = torch.promote_types(gradient.dtype, torch.float32)
        return (places.weight.to(wide) * gradient.to(wide)).abs()


@dataclass(frozen=True)
class ByWeightAndGradient:
    """|w| + coefficient |g|.

    Source: Yuan et al. 2021 (MEST), https://arxiv.org/abs/2110.14032

    Attributes:
        coefficient: of the gradient, >= 0.
    """

    coefficient: float = 1.0
    needs: ClassVar[Needs] = "gradient"

    def __post_init__(self) -> None:
        """Check the coefficient."""
        check_number(self.coefficient, name="coefficient", minimum=0.0)

    def score(self, places: Places) -> Tensor:
        """|w| + coefficient |g|."""
        gradient = _known(places.gradient, places, "gradient")
        return places.weight.abs() + self.coefficient * gradient.abs()


@dataclass(frozen=True)
class ByMomentum:
    """|m|, m a decaying mean of the gradient.

    Source: Dettmers and Zettlemoyer 2019 (SNFS), https://arxiv.org/abs/1907.04840
    """

    needs: ClassVar[Needs] = "momentum"

    def score(self, places: Places) -> Tensor:
        """|m|."""
        return _known(places.mean, places, "mean gradient").abs()


@dataclass(frozen=True)
class ByAdamMomentum:
    """|m| / (sqrt(v) + 1e-8), the step that Adam would take.

    Source: TimDettmers/sparse_learning, core.py
    """

    needs: ClassVar[Needs] = "moments"

    def score(self, places: Places) -> Tensor:
        """|m| / (sqrt(v) + 1e-8)."""
        mean = _known(places.mean, places, "mean gradient")
        return mean.abs() / (_known(places.square, places, "mean square").sqrt() + 1e-8)


@dataclass(frozen=True)
class BySaliency:
    """|w| v^(1/4), v a decaying mean of squared gradients: see ``methods/saliency.py``."""

    needs: ClassVar[Needs] = "moments"

    def score(self, places: Places) -> Tensor:
        """|w| v^(1/4)."""
        return Saliency().score_with(places.weight, _known(places.square, places, "mean square"))


@dataclass(frozen=True)
class AtRandom:
    """Uniform in [0, 1), drawn on the CPU: the same on every device and rank."""

    needs: ClassVar[Needs] = "nothing"

    def score(self, places: Places) -> Tensor:
        """Uniform in [0, 1), float32."""
        drawn = torch.rand(places.weight.shape, generator=places.generator)
        return drawn.to(places.weight.device)


CRITERIA: dict[str, type[Criterion]] = {
    "magnitude": ByMagnitude,
    "gradient": ByGradient,
    "taylor": ByTaylor,
    "weight_and_gradient": ByWeightAndGradient,
    "momentum": ByMomentum,
    "adam_momentum": ByAdamMomentum,
    "saliency": BySaliency,
    "random": AtRandom,
}


def get_criterion(criterion: str | Criterion, *, name: str = "criterion") -> Criterion:
    """The criterion called ``criterion``, or ``criterion`` itself if it already is one.

    Args:
        criterion: a name of ``CRITERIA``, or an object with ``needs`` and ``score(places)``.
        name: of the argument, for the message.
    """
    if isinstance(criterion, str) and criterion in CRITERIA:
        return CRITERIA[criterion]()
    if isinstance(criterion, Criterion) and not isinstance(criterion, (str, type)):
        check_choice(criterion.needs, get_args(Needs), name=f"{name}.needs")
        return criterion
    raise ArgumentError(
        f"{name}: expected one of {', '.join(sorted(CRITERIA))}, or an object with needs and "
        f"score(places), got {criterion!r}"
    )


def scored(criterion: Criterion, places: Places) -> Tensor:
    """The score of ``places`` in float32 or wider, checked.

    Raises:
        ArgumentError: another shape, or NaN.
    """
    with torch.no_grad():
        score = criterion.score(places)
    if score.shape != places.weight.shape or bool(torch.isnan(score).any()):
        raise ArgumentError(
            f"criterion: expected scores of shape {tuple(places.weight.shape)} without NaN from "
            f"{type(criterion).__name__} for {places.name}, got shape {tuple(score.shape)} or NaN"
        )
    return score.to(torch.promote_types(score.dtype, torch.float32))
