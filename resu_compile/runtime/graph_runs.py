"""What a captured graph keeps for its calls: variants, the parameters they came with, their inputs.

A ``Variant`` is a compiled graph; a ``Binding`` one set of parameters that the graph was called
with; a ``Run`` a variant with the further inputs that these parameters bring.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resu_compile.phase import Phase
from resu_compile.runtime.module_hooks import unchanged_check
from resu_compile.runtime.packed_cache import content_of
from resu_compile.runtime.sparse_products import Product, signature_of
from resu_compile.state import MaskedWeight, registry_epoch

Compiled = Callable[..., Any]


@dataclass
class Variant:
    """A compiled graph and the further inputs it takes.

    Attributes:
        call: the compiled graph.
        masks: positions of the weights whose packed masks it takes.
        products: what the sparse op computes; those of other weights bring their packed tensors.
        dropped: positions of the arguments that it does not take: weights without dense storage.
        node_type: class of AOTAutograd's backward node, known after the first call.
        slots: (slot of that node's gradients, position of the weight) of each of ``masks``.
        holds: whether it is right for the sizes among the arguments; None if for all.
    """

    call: Compiled
    masks: list[int]
    products: list[Product]
    dropped: frozenset[int] = frozenset()
    node_type: type | None = None
    slots: list[tuple[int, int]] = field(default_factory=list)
    holds: Callable[[Sequence[Any]], bool] | None = None
    _pick: Callable[[Sequence[Any]], tuple[Any, ...]] | None = None

    def kept(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments that the graph takes."""
        if self._pick is None:
            self._pick = picker([i for i in range(len(args)) if i not in self.dropped])
        return self._pick(args)


class Binding:
    """One set of parameters that the graph is called with, and the masked weights among them."""

    def __init__(self, weights: dict[int, MaskedWeight], refs: list[weakref.ref[Any]]) -> None:
        self.weights = weights
        self.refs = refs
        self.registry_epoch = registry_epoch()
        self.controllers = list({id(w.controller): w.controller for w in weights.values()}.values())
        self.bits = [(weight, weight.bits) for weight in weights.values()]
        self.structure = -1
        self.products: tuple[Product, ...] | None = None
        self.runs: dict[Hashable, Run] = {}
        self.run: Run | None = None

    def follow_structure(self) -> None:
        """Forget what was chosen before counts of entries, or what may be freed, changed."""
        structure = sum(controller.structure for controller in self.controllers)
        if self.structure != structure:
            self.structure = structure
            self.products = None
            self.runs.clear()

    def is_current(self) -> bool:
        """Whether parameters and masks are where they were found."""
        return self.registry_epoch == registry_epoch() and all(
            [weight.bits is bits for weight, bits in self.bits]
        )


class Run:
    """A variant with the further inputs that one set of parameters brings."""

    def __init__(self, binding: Binding, variant: Variant) -> None:
        self.variant = variant
        own = {id(weight) for weight in binding.weights.values()}
        sparse = [c for c in binding.controllers if c.phase is Phase.SPARSE]
        self.zeroed = [
            (i, w)
            for i, w in binding.weights.items()
            if w.controller in sparse and i not in variant.dropped
        ]
        self.zeroed_elsewhere = [
            w for controller in sparse for w in controller.weights.values() if id(w) not in own
        ]
        self.controllers = binding.controllers
        self.binding = binding
        self.products = [(product, product.of(binding.weights)) for product in variant.products]
        self.content: list[Any] = []
        self.layouts: list[Any] = []
        self.extra: list[Tensor] = [binding.weights[i].bits for i in variant.masks]
        self.announce = _announcer(variant, binding.weights)
        self.begin()

    def begin(self) -> None:
        """Take this up with the masks and phases of now."""
        self.epochs = [(controller, controller.epoch) for controller in self.controllers]
        self.checks = [unchanged_check(controller) for controller in self.controllers]
        self.stamps: list[Any] | None = None
        self.resurrections = [(c, c.resurrection) for c in self.controllers if c.resurrection]

    def is_current(self) -> bool:
        """Whether masks and phases are those of the beginning."""
        return all([controller.epoch == epoch for controller, epoch in self.epochs])

    def settle(self, args: Sequence[Any]) -> bool:
        """Do what ``Controller.refresh`` does, and bring packed weights up to date.

        Returns:
            False if a packed weight no longer has the sizes that the variant was compiled for.
        """
        for weight in self.zeroed_elsewhere:
            weight.refresh(zero=True)
        if self.products and self._stamps(args) == self.stamps:
            return True
        for index, weight in self.zeroed:
            weight.enforce_zeros(args[index])
        for controller, resurrection in self.resurrections:
            resurrection.recover(controller.weights)
        if self.products:
            content = [content_of(members) for _, members in self.products]
            if content != self.content:
                packed = [product.packed(self.binding.weights) for product, _ in self.products]
                layouts = [signature_of(each) for each in packed]
                if self.layouts and layouts != self.layouts:
                    return False
                self.layouts = layouts
                self.extra = [tensor for each in packed for tensor in each.tensors()]
                self.content = content
            if all([weight.trusts_versions for _, weight in self.zeroed]):
                self.stamps = self._stamps(args)
        return True

    def _stamps(self, args: Sequence[Any]) -> list[Any]:
        """Unchanged as long as none of the weights is, masks and phases being the same.

        Inference looks at these alone: for 224 weights 30 us, all of the above 248 us (one thread
        of an AMD EPYC).
        """
        return [
            (args[i]._version, args[i].data_ptr(), weight.step_count) for i, weight in self.zeroed
        ]


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function from arguments to those at ``positions``."""
    if len(positions) < 2:  # itemgetter gives no tuple then
        return lambda args: tuple([args[index] for index in positions])
    return operator.itemgetter(*positions)


# -- gradients ---------------------------------------------------------------------------------
def _announcer(variant: Variant, weights: dict[int, MaskedWeight]) -> Callable[[Any, Any], None]:
    """A hook of the backward node: tells each weight which gradient its graph has masked."""
    routed = {i: (weights[i], weights[i].controller.routing) for i in variant.masks}

    def announce(grad_inputs: Sequence[Tensor | None], _: Any) -> None:
        for slot, index in variant.slots:
            grad = grad_inputs[slot]
            if grad is not None:
                weight, routing = routed[index]
                weight.note_graph_gradient(grad, routing)

    return announce


def backward_node(out: Any, args: Sequence[Any], variant: Variant) -> Any:
    """AOTAutograd's node of this call, behind the outputs; None if nothing needs a gradient."""
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    if variant.node_type is not None:
        for node in _nodes_behind(outputs):
            if type(node) is variant.node_type:
                return node
        return None
    # inputs may be outputs of other compiled graphs, and may be returned
    earlier = {type(node) for node in _nodes_behind(args)}
    for node in _nodes_behind(outputs):
        if "CompiledFunction" in node.name() and type(node) not in earlier:
            positions = {id(args[index]): index for index in variant.masks}
            variant.node_type = type(node)
            variant.slots = [
                (slot, positions[id(parent.variable)])
                for slot, (parent, _) in enumerate(node.next_functions)
                if id(getattr(parent, "variable", None)) in positions
            ]
            return node
    return None


def _nodes_behind(values: Iterable[Any]) -> Iterator[Any]:
    """The autograd node of each tensor and, behind views of it, a few more."""
    for value in values:
        node = value.grad_fn if isinstance(value, Tensor) else None
        for _ in range(4):
            if node is None:
                break
            yield node
            node = node.next_functions[0][0] if node.next_functions else None
