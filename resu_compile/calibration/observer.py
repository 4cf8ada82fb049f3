"""Sees the input of every product with a chosen weight, at the operators that eager mode runs.

    F.linear(x, w)          ->   aten.addmm(bias, x, w.t())        input of w: x, summed over dim 1
    x @ w                   ->   aten.mm(x, w)                     input of w: x, summed over dim 0
    F.conv2d(x, w)          ->   aten.convolution(x, w, ...)       input of w: patches of x

Modules are not asked: a weight is known by its memory, and its orientation by the strides of the
view that the operator got. Hence attention projections, bare parameters, stacked experts and layers
whose forward nobody calls (the output projection of nn.MultiheadAttention) need no code of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from resu_compile.calibration.places import Place, PlaceMap, extent
from resu_compile.calibration.statistics import (
    InputStatistics,
    RunningStatistics,
    Summary,
    count_samples,
    summarize,
)
from resu_compile.comparison import RowLayout
from resu_compile.errors import ArgumentError

aten = torch.ops.aten

# operator -> positions of the two factors; the weight may be either
_PRODUCTS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.addmv.default: (1, 2),
    aten._addmm_activation.default: (1, 2),
}
# not in every release
_GROUPED = [
    getattr(aten, name).default for name in ("_grouped_mm", "grouped_mm") if hasattr(aten, name)
]
_COPIES = (aten.clone.default, aten._to_copy.default)


@dataclass
class _Watched:
    """What is known of one weight so far."""

    parameter: Tensor
    places: PlaceMap
    input_dims: tuple[int, ...] | None = None
    kernel: bool = False
    parts: dict[Place, RunningStatistics] = field(default_factory=dict)
    other_ops: set[str] = field(default_factory=set)


class Observer(TorchDispatchMode):
    """Gathers statistics of the inputs of weights while the model runs under it.

    Args:
        weights: parameter name -> parameter.
        moments: gather mean and variance of the inputs as well as their squares.

    Attributes:
        samples: number of samples of the call that is running.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], moments: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = 1
        self._moments = moments
        self._watched: dict[str, _Watched] = {}
        for name, weight in weights.items():
            values = weight.detach()
            self._watched[name] = _Watched(values, PlaceMap(values))
        self._by_storage: dict[int, list[str]] = {}
        for name, entry in self._watched.items():
            self._by_storage.setdefault(_address(entry.parameter), []).append(name)
        # address -> memory, weight, number and shift of a copy; autocast keeps its casts for long
        self._copies: dict[int, tuple[StorageWeakRef, str, int | None, int]] = {}

    @contextmanager
    def counting(self, module: nn.Module) -> Iterator[None]:
        """Observe; each call of ``module`` says how many samples it stands for."""

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.samples = count_samples(args, kwargs)

        handle = module.register_forward_pre_hook(before, with_kwargs=True)
        try:
            with self:
                yield
        finally:
            handle.remove()
            self._copies.clear()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` and note what it says about a weight."""
        kwargs = kwargs or {}
        found = {
            i: hit
            for i, arg in enumerate(args)
            if isinstance(arg, Tensor) and (hit := self._find(arg)) is not None
        }
        if not found:
            return func(*args, **kwargs)
        if func not in _PRODUCTS and func is not aten.convolution.default:
            with self:  # inference mode hands over composite operators whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            for position, (name, place) in found.items():
                self._note(func, args, position, name, place, output)
        return output

    # -- which weight ----------------------------------------------------------------------------
    def _find(self, tensor: Tensor) -> tuple[str, Place] | None:
        """The weight that ``tensor`` comes from, and the place in it."""
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        address = _address(tensor)
        if not address:
            return None
        offset, sizes, strides = int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
        if address in self._copies:
            storage, name, copy, shift = self._copies[address]
            if not storage.expired():
                return name, Place(offset + shift, sizes, strides, copy)
            del self._copies[address]  # other memory at the same address
        for name in self._by_storage.get(address, ()):
            weight = self._watched[name].parameter
            inside = offset - int(weight.storage_offset())
            if inside >= 0 and inside + extent(tensor) <= extent(weight):
                return name, Place(inside, sizes, strides)
        return None

    def _note(
        self, func: Any, args: Sequence[Any], position: int, name: str, place: Place, output: Any
    ) -> None:
        if func in _PRODUCTS and position in _PRODUCTS[func]:
            first, second = _PRODUCTS[func]
            right = position == second
            self._product(name, place, args[first if right else second], right)
        elif func is aten.convolution.default and position == 1 and not args[6]:
            self._convolution(name, place, args)
        elif func in _GROUPED and position == 1 and len(place.sizes) == 3 and args[0].dim() == 2:
            self._grouped(name, place, args[0], args[2])
        elif func in _COPIES:
            shift = -int(output.storage_offset())
            number = None
            if place.copy is None and output.stride() == place.strides:
                shift += place.offset
            else:
                number = self._watched[name].places.copied(place, output.stride())
            reference = StorageWeakRef(output.untyped_storage())
            self._copies[_address(output)] = (reference, name, number, shift)
        elif not (isinstance(output, Tensor) and _address(output) == _address(args[position])):
            transposed = func is aten.convolution.default and args[6]
            self._watched[name].other_ops.add(
                "a transposed convolution" if transposed else str(func)
            )

    # -- products --------------------------------------------------------------------------------
    def _product(self, name: str, place: Place, inputs: Tensor, right: bool) -> None:
        """One product ``inputs @ weight`` (``right``) or ``weight @ inputs``."""
        sizes, strides = place.sizes, place.strides
        if len(sizes) == 1:  # a part of the weight as a vector
            sizes, strides = (*sizes, 1), (*strides, 1)
        if inputs.dim() == 1:
            inputs = inputs.unsqueeze(-1)
        if len(sizes) == 3 and strides[0] == 0 and sizes[0] > 1:  # one matrix for all of a batch
            sizes, strides = sizes[1:], strides[1:]
            inputs = inputs.flatten(0, 1) if right else inputs.movedim(0, 1).flatten(1, 2)
        place = replace(place, sizes=sizes, strides=strides)
        axis = len(sizes) - (2 if right else 1)
        tokens = inputs.dim() - (2 if right else 1)
        summary = summarize(inputs, (tokens,), self.samples, self._moments)
        turned = _map(summary, lambda part: part.transpose(-1, -2))  # broadcasts to the place
        self._orient(name, self._watched[name].places.dims_along(place, axis), False)
        self._add(name, place, turned)

    def _grouped(self, name: str, place: Place, inputs: Tensor, ends: Tensor) -> None:
        """Each matrix of a stack has the rows of ``inputs`` up to its entry of ``ends``."""
        start = 0
        for expert, end in enumerate(ends.tolist()):
            offset = place.offset + expert * place.strides[0]
            part = replace(place, offset=offset, sizes=place.sizes[1:], strides=place.strides[1:])
            self._product(name, part, inputs[start:end], True)
            start = end

    def _convolution(self, name: str, place: Place, args: Sequence[Any]) -> None:
        """Columns are (channel, kernel place); each sees a shifted, strided part of the input."""
        inputs, weight, _, stride, padding, dilation = args[:6]
        groups, kernel = args[8], weight.shape[2:]
        if inputs.dim() == weight.dim() - 1:
            inputs = inputs.unsqueeze(0)
        padded = F.pad(inputs, [side for p in reversed(padding) for side in (p, p)])
        lengths = [
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
        ]
        dims = (0, *range(2, padded.dim()))
        windows = []
        for corner in product(*(range(k) for k in kernel)):
            window = [slice(None), slice(None)]
            for at, s, d, length in zip(corner, stride, dilation, lengths, strict=True):
                window.append(slice(at * d, at * d + s * (length - 1) + 1, s))
            windows.append(summarize(padded[tuple(window)], dims, self.samples, self._moments))

        def joined(pick: Callable[[Summary], Tensor | None]) -> Tensor | None:
            parts = [part for seen in windows if (part := pick(seen)) is not None]
            if not parts:
                return None
            columns = torch.stack([part.flatten() for part in parts], -1)  # (channels, places)
            columns = columns.view(groups, -1, *kernel)
            each = 1 if groups == 1 else weight.shape[0] // groups
            return columns.repeat_interleave(each, 0)

        square = joined(lambda part: part.square)
        assert square is not None
        self._orient(name, tuple(range(1, weight.dim())), True)
        summary = Summary(
            self.samples,
            windows[0].tokens,
            square,
            joined(lambda part: part.total),
            joined(lambda part: part.centered),
        )
        self._add(name, place, summary)

    def _orient(self, name: str, dims: tuple[int, ...] | None, kernel: bool) -> None:
        watched = self._watched[name]
        if dims is None:
            raise ArgumentError(
                f"{name}: expected a product along whole dimensions of its shape "
                f"{tuple(watched.parameter.shape)}, which a calibrated method can take apart into "
                f"rows; leave it out with exclude={name!r}, or choose another method"
            )
        if watched.input_dims is not None and watched.input_dims != dims:
            raise ArgumentError(
                f"{name}: expected products along one dimension, but the model multiplies along "
                f"dimensions {watched.input_dims} and {dims}, so that it has no one input; leave "
                f"it out with exclude={name!r}, or choose another method"
            )
        watched.input_dims, watched.kernel = dims, kernel

    def _add(self, name: str, place: Place, summary: Summary) -> None:
        if summary.tokens:  # not an expert that no token was sent to
            self._watched[name].parts.setdefault(place, RunningStatistics()).add(summary)

    # -- the result ------------------------------------------------------------------------------
    def statistics(self) -> dict[str, InputStatistics]:
        """Parameter name -> statistics of its inputs.

        Raises:
            ArgumentError: a weight took part in no product, or only a part of it did, or inputs
                were NaN or infinite.
        """
        return {name: _finish(name, watched) for name, watched in self._watched.items()}


def _finish(name: str, watched: _Watched) -> InputStatistics:
    shape, parts = tuple(watched.parameter.shape), watched.parts
    if not parts or watched.input_dims is None:
        seen = f"only {', '.join(sorted(watched.other_ops))}" if watched.other_ops else "none"
        raise ArgumentError(
            f"{name}: expected a matrix product or a convolution with it while the model ran on "
            f"the calibration data, saw {seen}; give data that reach it, leave it out with "
            f"exclude={name!r}, or choose a method that needs no data"
        )
    layout = RowLayout(shape, watched.input_dims, watched.kernel)
    missing = _spread(watched, {key: torch.ones(()) for key in parts}) == 0
    if bool(missing.any()):
        raise ArgumentError(
            f"{name}: expected the calibration data to reach all of it, but {int(missing.sum())} "
            f"of {missing.numel()} entries were in no product (an expert without tokens); give "
            f"more data, or leave it out with exclude={name!r}"
        )
    square = _combine(watched, layout, lambda part: part.square, lambda part: part.samples)
    total = _combine(watched, layout, lambda part: part.total, lambda part: part.samples)
    variance = _variance(watched, layout)
    assert square is not None
    if not bool(torch.isfinite(square).all()):
        raise ArgumentError(
            f"calibration: expected finite inputs of {name}, got NaN or infinity; look at the "
            "data and at the model's dtype"
        )
    return InputStatistics(layout, square, total, variance)


def _combine(
    watched: _Watched,
    layout: RowLayout,
    value: Callable[[RunningStatistics], Tensor | None],
    number: Callable[[RunningStatistics], int],
) -> Tensor | None:
    """The mean of ``value`` over the parts that cover an entry, weighted by ``number``."""
    values = {key: value(part) for key, part in watched.parts.items()}
    known = {key: tensor for key, tensor in values.items() if tensor is not None}
    if not known:
        return None
    if len(known) == 1:
        return _compact(watched, _spread(watched, known), layout)
    counts = {key: float(number(watched.parts[key])) for key in known}
    weighted = _spread(watched, {key: tensor * counts[key] for key, tensor in known.items()})
    amount = _spread(watched, {key: torch.tensor(count) for key, count in counts.items()})
    return _compact(watched, weighted / amount, layout)


def _variance(watched: _Watched, layout: RowLayout) -> Tensor | None:
    """Population variance over the tokens of all parts that cover an entry."""

    def tokens(part: RunningStatistics) -> int:
        return part.tokens

    inside = _combine(
        watched,
        layout,
        lambda part: None if part.centered is None else part.centered / part.tokens,
        tokens,
    )
    if inside is None or len(watched.parts) == 1:
        return inside
    mean = _combine(watched, layout, lambda part: part.mean, tokens)
    assert mean is not None
    everywhere = watched.places.zeros().copy_(mean.expand(layout.shape))
    between = {}
    for place, part in watched.parts.items():
        assert part.mean is not None
        apart = part.mean - watched.places.read(everywhere, place)
        between[place] = apart.square() * part.tokens
    amount = {key: torch.tensor(float(part.tokens)) for key, part in watched.parts.items()}
    spread = _spread(watched, between) / _spread(watched, amount)
    return _compact(watched, inside + spread, layout)


def _spread(watched: _Watched, values: Mapping[Place, Tensor]) -> Tensor:
    """Sum of ``values``, each broadcast over its place; float32, shape of the weight."""
    full = watched.places.zeros()
    for place, value in values.items():
        watched.places.add(full, place, value)
    return full


def _compact(watched: _Watched, full: Tensor, layout: RowLayout) -> Tensor:
    """``full`` without its row dimensions where one part speaks for all rows."""
    parts = list(watched.parts.values())
    square = parts[0].square
    if len(parts) > 1 or square is None or square.numel() != layout.in_features:
        return full.contiguous()
    for dim in range(full.dim()):
        if dim not in layout.input_dims:
            full = full.narrow(dim, 0, 1)
    return full.contiguous()


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # wrapper subclasses have no storage
        return 0


def _map(summary: Summary, turn: Callable[[Tensor], Tensor]) -> Summary:
    return Summary(
        summary.samples,
        summary.tokens,
        turn(summary.square),
        None if summary.total is None else turn(summary.total),
        None if summary.centered is None else turn(summary.centered),
    )
