"""One captured graph, compiled once per phase, and the call that picks the variant.

A training graph has a variant for each routing of gradients; DENSE and an unfrozen RESU phase share
one, because in both every place is trained. An inference graph has a dense variant and, in the
SPARSE phase, one for each choice of sparse kernels, made anew only when counts change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from resu_compile.config import CompileConfig
from resu_compile.passes.effective_weight import route_gradients
from resu_compile.passes.find_weights import WeightSite, find_weights
from resu_compile.passes.fx_utils import copy_graph_module
from resu_compile.passes.sparse_matmul import insert_sparse_matmuls
from resu_compile.phase import Phase, Routing
from resu_compile.runtime.csr_cache import csr_of
from resu_compile.runtime.module_hooks import unchanged_check
try:
    from resu_compile.runtime.measure import sparse_buckets
except ImportError:
    sparse_buckets = lambda *a: 0
from resu_compile.state import MaskedWeight, masked_weight_of

Compiled = Callable[..., Any]
InnerCompile = Callable[[fx.GraphModule, Sequence[Any]], Compiled]
Adopt = Callable[[fx.GraphModule, Sequence[Any]], None]


class _Binding:
    """The masked weights among one set of arguments."""

    def __init__(self, weights: dict[int, MaskedWeight]) -> None:
        self.weights = weights
        self.controllers = list({id(w.controller): w.controller for w in weights.values()}.values())
        self.refs = {index: weakref.ref(w.parameter) for index, w in weights.items()}

    def fits(self, args: Sequence[Any]) -> bool:
        return all(args[index] is ref() for index, ref in self.refs.items())


class _Variant:
    """A compiled graph and the further inputs it takes."""

    def __init__(
        self, call: Compiled, masks: list[int], csr: list[tuple[int, bool]], routed: bool
    ) -> None:
        self.call = call
        self.masks = masks
        self.csr = csr
        self.routed = routed
        self.gradient_slots: list[tuple[int, int]] | None = None


class GraphVariants:
    """Stands where Dynamo expects the compiled graph.

    Args:
        gm: the captured graph, parameters lifted to placeholders; kept as it is.
        example_inputs: what Dynamo captured it with.
        config: compile options.
        inner: compiles a graph module for (fake) inputs.
        adopt: called when a call brings parameters that belong to no controller yet; None if
            ``sparsify`` is the only way in.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        config: CompileConfig,
        inner: InnerCompile,
        adopt: Adopt | None = None,
    ) -> None:
        self.gm = copy_graph_module(gm)
        self.config = config
        self.training = torch.is_grad_enabled()
        self.compile_count = 0
        self._inner = inner
        self._adopt = adopt
        context = torch._guards.TracingContext.try_get()
        self._fake_mode = context.fake_mode if context else None
        self._parameters = [
            i for i, value in enumerate(example_inputs) if isinstance(value, torch.nn.Parameter)
        ]
        self._variants: dict[Hashable, _Variant] = {}
        self._sites: list[WeightSite] | None = None
        self._binding = self._bind(example_inputs)
        self._plan_cache: dict[tuple[int, int], tuple[tuple[int, int], ...]] = {}
        self._variant_for(self._binding)  # errors of the compiler belong to this first call

    # -- call ----------------------------------------------------------------------------------
    def __call__(self, *args: Any) -> Any:
        """Run the variant of the present phase."""
        binding = self._binding
        if not binding.fits(args):
            binding = self._binding = self._bind(args)
        for controller in binding.controllers:
            controller.refresh()
        variant = self._variant_for(binding)
        extra: list[Tensor] = [binding.weights[index].bits for index in variant.masks]
        for index, transposed in variant.csr:
            csr = csr_of(binding.weights[index], transposed=transposed)
            extra += (csr.ptr, csr.col, csr.val)
        out = variant.call(*args, *extra)
        if variant.routed and torch.is_grad_enabled():
            self._announce_gradients(out, variant, binding)
        return out

    def _bind(self, args: Sequence[Any]) -> _Binding:
        parameters = {index: args[index] for index in self._parameters}
        if self._adopt is not None:
            self._adopt(self.gm, args)
        found = {index: masked_weight_of(value) for index, value in parameters.items()}
        return _Binding({index: weight for index, weight in found.items() if weight is not None})

    # -- which variant -------------------------------------------------------------------------
    def _variant_for(self, binding: _Binding) -> _Variant:
        key = self._key(binding)
        variant = self._variants.get(key)
        if variant is None:
            variant = self._variants[key] = self._compile(binding)
        return variant

    def _key(self, binding: _Binding) -> Hashable:
        if self.training:
            routings = [controller.routing for controller in binding.controllers]
            if len(routings) == 1:  # the common case, without a loop over the weights
                return (routings[0], len(binding.weights))
            return tuple((i, w.controller.routing) for i, w in binding.weights.items())
        plan = self._plan(binding)
        return tuple((site, bits, binding.weights[self.sites[site].index].nnz) for site, bits in plan)

    @property
    def sites(self) -> list[WeightSite]:
        """The weight sites of the captured graph."""
        if self._sites is None:
            self._sites, _ = find_weights(self.gm, self._parameters)
        return self._sites

    def _plan(self, binding: _Binding) -> tuple[tuple[int, int], ...]:
        """(site, batch buckets) of every site that takes the sparse kernel now."""
        if len(binding.controllers) != 1 or binding.controllers[0].phase is not Phase.SPARSE:
            return ()
        controller = binding.controllers[0]
        key = (id(controller), controller.structure)
        if key not in self._plan_cache:
            self._plan_cache = {key: tuple(self._choose(binding))}
        return self._plan_cache[key]

    def _choose(self, binding: _Binding) -> list[tuple[int, int]]:
        chosen = []
        for position, site in enumerate(self.sites):
            weight = binding.weights.get(site.index)
            if weight is None or site.form is None:
                continue
            buckets = sparse_choice(site, weight, self.config)
            if buckets:
                chosen.append((position, buckets))
        return chosen

    # -- compile -------------------------------------------------------------------------------
    def _compile(self, binding: _Binding) -> _Variant:
        masks: list[int] = []
        csr: list[tuple[int, bool]] = []
        if self.training:
            routings = {i: w.controller.routing for i, w in binding.weights.items()}
            trained = {
                i: routing
                for i, routing in routings.items()
                if binding.weights[i].parameter.requires_grad
            }
            gm, masks, _ = route_gradients(self.gm, trained)
        else:
            gm, csr, _ = insert_sparse_matmuls(self.gm, self.sites, dict(self._plan(binding)))
        extra: list[Tensor] = [binding.weights[index].bits for index in masks]
        for index, transposed in csr:
            packed = csr_of(binding.weights[index], transposed=transposed)
            extra += (packed.ptr, packed.col, packed.val)
        call = self._compile_graph(gm, extra)
        self.compile_count += 1
        return _Variant(call, masks, csr, routed=bool(masks))

    def _compile_graph(self, gm: fx.GraphModule, extra: Sequence[Tensor]) -> Compiled:
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders[len(placeholders) - len(extra) :], extra, strict=True):
            node.meta["example_value"] = self._fake(value)
        inputs = [node.meta.get("example_value") for node in placeholders]
        tracing: Any = nullcontext()
        if torch._guards.TracingContext.try_get() is None:
            # a later variant of a graph that Dynamo has captured already
            tracing = torch._guards.tracing(torch._guards.TracingContext(self._fake_mode))
        with tracing:
            return self._inner(gm, inputs)

    def _fake(self, value: Tensor) -> Tensor:
        if self._fake_mode is None:
            return value
        return self._fake_mode.from_tensor(value, static_shapes=True)

    # -- gradients -----------------------------------------------------------------------------
    def _announce_gradients(self, out: Any, variant: _Variant, binding: _Binding) -> None:
        """Tell each weight which gradient tensor this graph has masked, when its backward runs."""
        node = _compiled_node(out)
        if node is None:
            return
        if variant.gradient_slots is None:
            variant.gradient_slots = _gradient_slots(node, binding)
        slots = [(slot, binding.weights[index]) for slot, index in variant.gradient_slots]

        def announce(grad_inputs: Sequence[Tensor | None], grad_outputs: Any) -> None:
            for slot, weight in slots:
                grad = grad_inputs[slot] if slot < len(grad_inputs) else None
                if grad is not None:
                    weight.note_graph_gradient(grad, weight.controller.routing)

        node.register_hook(announce)
        for controller in binding.controllers:
            node.register_prehook(unchanged_check(controller))


def sparse_choice(site: WeightSite, weight: MaskedWeight, config: CompileConfig) -> int:
    """Bit mask of the batch buckets in which ``site`` takes the sparse kernel; 0 means dense."""
    rows, dtype = rows_and_dtype(site)
    out_features, in_features = reversed(weight.shape) if site.transposed else weight.shape
    return sparse_buckets(
        weight.parameter.device,
        out_features,
        in_features,
        weight.sparsity,
        dtype or weight.parameter.dtype,
        rows,
        config.sparse_threshold,
    )


def rows_and_dtype(site: WeightSite) -> tuple[int | None, torch.dtype | None]:
    """Rows of x (None if dynamic) and dtype of the product at ``site``."""
    out = site.node.meta.get("example_value")
    if not isinstance(out, Tensor):
        return None, None
    sizes = list(out.shape)
    columns = -2 if site.form == "matmul_left" else -1
    del sizes[columns]
    if all(isinstance(size, int) for size in sizes):
        rows = 1
        for size in sizes:
            rows *= size
        return rows, out.dtype
    return None, out.dtype


def _compiled_node(out: Any) -> Any:
    """AOTAutograd's node behind the outputs; outputs that are views hide it by a step or two."""
    for value in out if isinstance(out, (tuple, list)) else (out,):
        node = value.grad_fn if isinstance(value, Tensor) else None
        for _ in range(4):
            if node is None or "CompiledFunction" in node.name():
                break
            node = node.next_functions[0][0] if node.next_functions else None
        if node is not None and "CompiledFunction" in node.name():
            return node
    return None


def _gradient_slots(node: Any, binding: _Binding) -> list[tuple[int, int]]:
    """(slot of the node's gradients, position of the weight) of every masked weight."""
    positions = {id(ref()): index for index, ref in binding.refs.items()}
    slots = []
    for slot, (parent, _) in enumerate(node.next_functions):
        variable = getattr(parent, "variable", None)
        if variable is not None and id(variable) in positions:
            slots.append((slot, positions[id(variable)]))
    return slots


