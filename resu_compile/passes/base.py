"""What every pass hands back: what it rewrote, what it left alone and why, and how long it took."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PassReport:
    """Account of one run of one pass.

    Attributes:
        name: the pass, as its function is called.
        rewritten: weight or node name -> what it became.
        skipped: weight or node name -> why it was left as it is.
        elapsed_ms: time of the run in milliseconds.
    """

    name: str
    rewritten: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    elapsed_ms: float = 0.0

    def __str__(self) -> str:
        """One line of totals, then one indented line a name, aligned."""
        head = (
            f"{self.name}: {len(self.rewritten)} rewritten, {len(self.skipped)} skipped, "
            f"{self.elapsed_ms:.1f} ms"
        )
        rows = [(name, f"-> {what}") for name, what in self.rewritten.items()]
        rows += [(name, f"left: {why}") for name, why in self.skipped.items()]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join([head, *(f"  {name:<{width}}  {text}" for name, text in rows)])
