"""Wanda: weights times the norm of their inputs, compared within an output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from resu_compile.methods.registry import check_blocks, register_method

if TYPE_CHECKING:
    from resu_compile.calibration.block import Block


@register_method("wanda")
@dataclass(frozen=True)
class Wanda:
    """Prune by the magnitude of a weight times the norm of its input.

        S_ij = |W_ij| * sqrt(s_j)      s_j = mean over samples of ||X_j||_2^2, float32

    Scores are compared within a row, the weights of one output: int(n_in * sparsity) of each row
    go, the lowest first, of equal scores the lower index. With a pattern N:M, the M - N lowest of
    each M consecutive inputs. The number kept of a weight is therefore rows * (n_in -
    int(n_in * sparsity)), which other methods round over the whole weight.

    The model is pruned block by block: the inputs of a block are the outputs of the blocks pruned
    before it. For a convolution an input column is a channel at one place of the kernel.

    Attributes:
        blocks: name of the module that holds the blocks ("model.layers"), or the names of the
            blocks; None finds them.

    Source: Sun et al. 2023, https://arxiv.org/abs/2306.11695; locuslab/wanda, lib/prune.py, which
    uses 128 samples and leaves embedding and head dense, as does the default selection here.
    """

    blocks: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Check ``blocks``."""
        object.__setattr__(self, "blocks", check_blocks(self.blocks))

    def prune(self, block: Block) -> dict[str, Tensor]:
        """Masks of the weights of ``block``."""
        statistics = block.statistics()
        scores = {
            name: weight.detach().abs() * statistics[name].norm
            for name, weight in block.weights.items()
        }
        return block.lowest_masks(scores, {name: s.layout for name, s in statistics.items()})
