"""N:M patterns for methods that see no data: which dimension of a weight is its input.

nn.Linear, attention, recurrent layers: [out, in], the last dimension
convolutions: [out, in, *kernel], the channels, at each place of the kernel
transposed convolutions: [in, out, *kernel], the first dimension
layers with nx and nf, or in_features and out_features: as these numbers say
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from resu_compile.comparison import Pattern, RowLayout, check_divisible, pattern_mask
from resu_compile.errors import ArgumentError
from resu_compile.selection import NamedWeight


def layout_of(weight: NamedWeight) -> RowLayout:
    """The layout of a weight, from the layer that owns it.

    Raises:
        ArgumentError: the owner does not tell which dimension is the input.
    """
    shape, owner = tuple(weight.parameter.shape), weight.owner
    if isinstance(owner, _ConvTransposeNd):
        return RowLayout(shape, (0,))
    if isinstance(owner, _ConvNd):
        return RowLayout(shape, tuple(range(1, len(shape))), kernel=True)
    if isinstance(owner, nn.Linear) or type(owner).__module__.startswith("torch.nn.modules"):
        return RowLayout(shape, (len(shape) - 1,))
    for inputs, outputs in (("nx", "nf"), ("in_features", "out_features")):
        sizes = (getattr(owner, inputs, None), getattr(owner, outputs, None))
        if None in sizes or len(shape) != 2:
            continue
        # a square weight: layers with nx and nf multiply by [in, out], those of torch by [out, in]
        if shape == sizes and (inputs == "nx" or sizes[0] != sizes[1]):
            return RowLayout(shape, (0,))
        if shape == sizes[::-1]:
            return RowLayout(shape, (1,))
    raise ArgumentError(
        f"pattern: expected a layer that tells which dimension of {weight.name} of shape {shape} "
        f"is its input, but it belongs to {type(owner).__name__}; leave it out with "
        f"exclude={weight.name!r}, or take a calibrated method such as 'wanda', which sees it"
    )


def committed_layout(weight: NamedWeight, mask: Tensor, pattern: Pattern) -> RowLayout:
    """The layout in which ``mask`` has the pattern: the layer's, or the only one that fits.

    Args:
        weight: the weight, pruned by ``pattern``.
        mask: bool, shape of the weight, True = active.
        pattern: N:M.

    Raises:
        ArgumentError: the owner does not tell which dimension is the input, nor does the mask.
    """
    try:
        layout = layout_of(weight)
    except ArgumentError as error:
        shape = tuple(weight.parameter.shape)
        fitting = [
            layout
            for layout in (RowLayout(shape, (dim,)) for dim in range(len(shape)))
            if _has_pattern(mask, layout, pattern)
        ]
        if len(fitting) != 1:
            raise ArgumentError(
                f"strategy: expected 'reprune' for {weight.name} of shape {shape} under "
                f"pattern='{pattern}', because neither its layer nor its mask tells which "
                "dimension is its input"
            ) from error
        return fitting[0]
    check_divisible(weight.name, layout, pattern)
    return layout


def _has_pattern(mask: Tensor, layout: RowLayout, pattern: Pattern) -> bool:
    if layout.group_length % pattern.group:
        return False
    groups = layout.to_rows(mask).reshape(-1, pattern.group)
    return bool((groups.sum(-1) == pattern.keep).all())


def pattern_masks(
    weights: Sequence[NamedWeight],
    scores: Mapping[str, Tensor],
    pattern: Pattern,
    active: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """N:M masks from scores; of equal ones the lower index is kept first.

    Args:
        weights: the weights to prune.
        scores: parameter name -> score of the weight's shape, free of NaN.
        pattern: N:M.
        active: parameter name -> bool mask of the places that come first; may be empty.

    Raises:
        ArgumentError: M does not divide the inputs of a weight, or these are not known.
    """
    masks = {}
    for weight in weights:
        layout = layout_of(weight)
        check_divisible(weight.name, layout, pattern)
        masks[weight.name] = pattern_mask(
            scores[weight.name], layout, pattern, active.get(weight.name), keep_lower=True
        )
    return masks
