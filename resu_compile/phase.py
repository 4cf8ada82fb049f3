"""The three phases, and which places of a weight the gradient reaches in each."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """Which graph variant runs and who may move.

    DENSE: everything is trained. SPARSE: pruned places stay exactly 0.
    RESU: pruned places hold theta and are trained to compete for a place.
    """

    DENSE = "dense"
    SPARSE = "sparse"
    RESU = "resu"


class Routing(StrEnum):
    """The places of a masked weight that its gradient reaches."""

    ALL = "all"
    ACTIVE = "active"
    PRUNED = "pruned"

    @property
    def keeps_active(self) -> bool:
        """The ``keep`` argument of the masking ops; meaningless for ``ALL``."""
        return self is Routing.ACTIVE
