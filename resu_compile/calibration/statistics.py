"""Running statistics of the inputs of a weight, one number an input column.

    square   s_j = mean over samples of ||X_j||_2^2        X_j: input j of all tokens of a sample
    total    t_j = mean over samples of the sum of X_j
    variance v_j = population variance of X_j over all tokens

All of it in float32, added up call by call in the order of the calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resu_compile.comparison import RowLayout


@dataclass(frozen=True)
class Summary:
    """What one product tells of the inputs of a weight, or of the part of it that it used.

    Attributes:
        samples: number of samples.
        tokens: number of input vectors.
        square: sum over tokens of x_j^2, float32; broadcasts to the part.
        total: sum over tokens of x_j.
        centered: sum over tokens of (x_j - mean_j)^2.
    """

    samples: int
    tokens: int
    square: Tensor
    total: Tensor | None = None
    centered: Tensor | None = None


def count_samples(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Samples that one call of a block stands for.

    The first tensor with a dimension of samples counts: floating point of three dimensions or more
    (samples, tokens, features), or integers of two or more (samples, tokens). A call with plain
    matrices is one sample.

    Source: locuslab/wanda, lib/layerwrapper.py, where a matrix is one sample.
    """
    for leaf in tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim() >= (3 if leaf.is_floating_point() else 2):
            return max(leaf.shape[0], 1)
    return 1


def summarize(inputs: Tensor, dims: tuple[int, ...], samples: int, moments: bool) -> Summary:
    """The summary of ``inputs`` over ``dims``, which stay with size 1.

    Args:
        inputs: any floating-point tensor.
        dims: its token dimensions.
        samples: number of samples that the call stands for.
        moments: compute ``total`` and ``centered`` as well.
    """
    x = inputs.detach().float()
    tokens = 1
    for dim in dims:
        tokens *= x.shape[dim]
    square = x.square().sum(dims, keepdim=True)
    if not moments:
        return Summary(samples, tokens, square)
    total = x.sum(dims, keepdim=True)
    centered = (x - total / max(tokens, 1)).square_().sum(dims, keepdim=True)
    return Summary(samples, tokens, square, total, centered)


class RunningStatistics:
    """Summaries of one part of a weight, added up."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens = 0
        self.square: Tensor | None = None
        self.total: Tensor | None = None
        self.mean: Tensor | None = None
        self.centered: Tensor | None = None

    def add(self, new: Summary) -> None:
        """Take one more call into the means.

        Source: locuslab/wanda, lib/layerwrapper.py (running mean over samples); Chan, Golub and
        LeVeque 1979 (variance of two groups).
        """
        old, every = self.samples, self.samples + new.samples
        scale = old / every
        if self.square is None:
            self.square = torch.zeros_like(new.square)
        self.square = self.square * scale + new.square / every
        if new.total is not None and new.centered is not None and new.tokens:
            mean = new.total / new.tokens
            if self.total is None or self.mean is None or self.centered is None:
                self.total, self.mean, self.centered = new.total / every, mean, new.centered
            else:
                tokens = self.tokens + new.tokens
                apart = mean - self.mean
                self.total = self.total * scale + new.total / every
                self.mean = self.mean + apart * (new.tokens / tokens)
                spread = apart.square() * (self.tokens * new.tokens / tokens)
                self.centered = self.centered + new.centered + spread
        self.samples = every
        self.tokens += new.tokens


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the inputs of one weight; each tensor broadcasts to its shape.

    Attributes:
        layout: which dimensions of the weight run along the input.
        square: s_j, float32, >= 0.
        total: t_j, float32; None unless moments were asked for.
        variance: v_j, float32, >= 0; None unless moments were asked for.
    """

    layout: RowLayout
    square: Tensor
    total: Tensor | None = None
    variance: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """sqrt(s_j), float32; broadcasts to the weight."""
        return self.square.sqrt()
