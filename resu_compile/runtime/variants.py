"""One captured graph, compiled once per phase, and the call that picks the variant.

A training graph has a variant for each routing of gradients; DENSE and an unfrozen RESU phase share
one, because in both every place is trained. An inference graph has a dense variant and, in the
SPARSE phase, one for each choice of sparse kernels, made anew only when counts change.

What a call has to know is kept by the parameters that it brings and, until masks or phase change,
by the controllers' epochs (runtime/graph_runs.py), so that a call looks up and compares only.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from resu_compile.config import CompileConfig
from resu_compile.errors import PhaseError, WeightError
from resu_compile.passes.base import PassReport
from resu_compile.passes.effective_weight import route_gradients
from resu_compile.passes.find_weights import WeightSite, find_weights
from resu_compile.passes.fx_utils import call_name, copy_graph_module
from resu_compile.passes.released_values import use_released_weights_themselves
from resu_compile.passes.sparse_matmul import drop_unused, insert_sparse_matmuls
from resu_compile.phase import Phase, Routing
from resu_compile.runtime.controller import Controller
from resu_compile.runtime.dense_release import NOT_YET
from resu_compile.runtime.graph_runs import Binding, Compiled, Run, Variant, backward_node, picker
from resu_compile.runtime.released import RESTORE, run_eagerly
from resu_compile.runtime.sparse_products import (
    Product,
    choose_products,
    release_unused,
    signature_of,
)
from resu_compile.state import MaskedWeight, masked_weight_of

logger = logging.getLogger(__name__)

InnerCompile = Callable[[fx.GraphModule, Sequence[Any]], Compiled]
Adopt = Callable[[fx.GraphModule, Sequence[Any]], None]

_known_controllers: weakref.WeakSet[Controller] = weakref.WeakSet()
_warned_of: weakref.WeakSet[MaskedWeight] = weakref.WeakSet()


def know(controller: Controller) -> None:
    """Let graphs look among the weights of ``controller`` for parameters that are new to them."""
    _known_controllers.add(controller)


class GraphVariants:
    """Stands where Dynamo expects the compiled graph.

    Args:
        gm: the captured graph, parameters lifted to placeholders; kept as it is.
        example_inputs: what Dynamo captured it with.
        config: compile options.
        inner: compiles a graph module for (fake) inputs.
        adopt: called when a call brings parameters for the first time, to give those a controller
            that have none yet; None if ``sparsify`` is the only way in.

    Attributes:
        training: whether gradients may flow through the graph.
        compile_count: how many variants were compiled so far.
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
        use_released_weights_themselves(self.gm)
        self.config = config
        self.training = torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in example_inputs
        )
        self.compile_count = 0
        self._inner = inner
        self._adopt = adopt
        context = torch._guards.TracingContext.try_get()
        self._fake_mode = context.fake_mode if context else None
        self._shape_guards: int | None = None  # Dynamo's own; known once it has frozen them
        self._parameters = [i for i, v in enumerate(example_inputs) if isinstance(v, nn.Parameter)]
        self._identity = _identity_of(self._parameters)
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._variants: dict[Hashable, Variant] = {}
        self._sites: list[WeightSite] | None = None
        binding = self._bind(example_inputs)
        self._warn_of_other_uses(binding)
        if not self._is_refused(binding) and not self._may_release(binding):
            self._prepare(binding)  # errors of the compiler belong to this call

    # -- call ----------------------------------------------------------------------------------
    def __call__(self, *args: Any) -> Any:
        """Run the variant of the present phase."""
        binding = self._bindings.get(self._identity(args))
        if binding is None or not binding.is_current():
            binding = self._bind(args)
        run = binding.run
        if run is None or not run.is_current():
            run = self._settled(binding)
            if run is None:  # eager this once: Dynamo captures what it finds at the next call
                return run_eagerly(self.gm, args)
        if not run.settle(args):
            binding.runs.clear()
            run = self._prepare(binding)
            run.settle(args)
        variant = run.variant
        if variant.holds is not None and not variant.holds(args):
            # eager: gradients are masked where they are accumulated
            return run_eagerly(self.gm, args)
        if variant.dropped:
            args = variant.kept(args)
        out = variant.call(*args, *run.extra)
        if run.checks and self.training:
            node = backward_node(out, args, variant)
            if node is not None:
                for check in run.checks:
                    node.register_prehook(check)
                node.register_hook(run.announce)
        return out

    def _bind(self, args: Sequence[Any]) -> Binding:
        """Find the masked weights among ``args``; remembered until one of the parameters dies."""
        if self._adopt is not None:
            self._adopt(self.gm, args)
        identity = self._identity(args)
        _find_replaced(identity)
        found = {index: masked_weight_of(args[index]) for index in self._parameters}
        weights = {index: weight for index, weight in found.items() if weight is not None}
        for controller in {weight.controller for weight in weights.values()}:
            know(controller)
            controller.refresh()

        bindings = self._bindings  # self would be held by its own parameters' references

        def forget(_: Any) -> None:
            bindings.pop(identity, None)

        refs = [weakref.ref(args[index], forget) for index in self._parameters]
        binding = self._bindings[identity] = Binding(weights, refs)
        return binding

    def _warn_of_other_uses(self, binding: Binding) -> None:
        """Say which weights were pruned by their shape alone and are not multiplied by."""
        multiplied = {site.index for site in self.sites}
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        for index, weight in binding.weights.items():
            users = {call_name(user) for user in placeholders[index].users if user.op != "output"}
            if not users or index in multiplied or weight in _warned_of:
                continue
            if weight.controller.config.targets is None:
                _warned_of.add(weight)  # once, not for each batch size that is captured anew
                logger.warning(
                    "%s was pruned, but this graph uses it in %s and multiplies nothing by it; if "
                    "it is no weight, exclude it or pass example_inputs to sparsify",
                    weight.name,
                    ", ".join(sorted(users)),
                )

    def _settled(self, binding: Binding) -> Run | None:
        """What runs from now on; None if dense storage was freed for it, and this is captured anew.

        One thread at a time, and none while another captures: a capture is of what it finds, and
        tracing changes state of the whole process.
        """
        from torch._dynamo.convert_frame import compile_lock

        if self._is_refused(binding):
            raise PhaseError(
                "expected a call without gradients, because release_dense() was asked for, which "
                f"is for inference; use torch.no_grad() or torch.inference_mode(); {RESTORE}"
            )
        with compile_lock:
            if self._may_release(binding) and self._release(binding):
                return None
            return self._prepare(binding)

    def _prepare(self, binding: Binding) -> Run:
        """Take up the variant of the present phase, and compile it the first time."""
        binding.follow_structure()
        state = tuple(
            [(controller.phase, controller.routing) for controller in binding.controllers]
        )
        run = binding.runs.get(state)
        if run is None:
            key = self._key(binding)
            variant = self._variants.get(key)
            if variant is None:
                variant = self._variants[key] = self._compile(binding)
            run = binding.runs[state] = Run(binding, variant)
        run.begin()
        binding.run = run
        return run

    # -- which variant -------------------------------------------------------------------------
    def _key(self, binding: Binding) -> Hashable:
        if self.training:
            return tuple((i, w.controller.routing) for i, w in binding.weights.items())
        return tuple(
            (product.sites, product.plan.kernels, signature_of(product.packed(binding.weights)))
            for product in self._products(binding)
        ), tuple(i for i, weight in binding.weights.items() if weight.is_released)

    @property
    def sites(self) -> list[WeightSite]:
        """The weight sites of the captured graph."""
        if self._sites is None:
            self._sites, _ = find_weights(self.gm, self._parameters)
        return self._sites

    def _products(self, binding: Binding) -> list[Product]:
        """What the sparse op computes now."""
        if binding.products is None:
            binding.products = tuple(
                choose_products(self.gm, self.sites, binding.weights, self.config)
            )
        return [
            product
            for product in binding.products
            if all(w.controller.phase is Phase.SPARSE for w, _ in product.of(binding.weights))
        ]

    # -- compile -------------------------------------------------------------------------------
    def _compile(self, binding: Binding) -> Variant:
        weights = binding.weights
        masks: list[int] = []
        products: list[Product] = []
        dropped: frozenset[int] = frozenset()
        if self.training:
            routings: dict[int, Routing] = {
                i: w.controller.routing for i, w in weights.items() if w.parameter.requires_grad
            }
            gm, masks, report = route_gradients(self.gm, routings)
        else:
            gm, products, report = self._with_sparse_products(binding)
            dropped = frozenset(i for i, weight in weights.items() if weight.is_released)
            if left := dropped - drop_unused(gm, dropped):
                return self._eager_variant([weights[i].name for i in sorted(left)])
        logger.debug("%s", report)
        extra: list[Tensor] = [weights[i].bits for i in masks]
        for product in products:
            extra += product.packed(binding.weights).tensors()
        variant = Variant(self._compile_graph(gm, extra), masks, products, dropped)
        variant.holds = self._size_check()
        self.compile_count += 1
        return variant

    def _with_sparse_products(
        self, binding: Binding
    ) -> tuple[fx.GraphModule, list[Product], PassReport]:
        """The graph with the products of now, and those that bring its further inputs."""
        products = {product.source: product for product in self._products(binding)}
        calls = [product.call(binding.weights) for product in self._products(binding)]
        gm, sources, report = insert_sparse_matmuls(self.gm, self.sites, calls)
        return gm, [products[source] for source in sources], report

    def _eager_variant(self, names: Sequence[str]) -> Variant:
        logger.warning(
            "this graph uses %s otherwise than as the weight of a matmul, but release_dense() "
            "freed the dense storage: it runs eagerly and unpacks the weights at each call",
            ", ".join(names),
        )
        return Variant(lambda *args: run_eagerly(self.gm, args), [], [])

    # -- release -------------------------------------------------------------------------------
    def _is_refused(self, binding: Binding) -> bool:
        """Whether this graph needs gradients of a model that is for inference."""
        return self.training and any(c.released is not None for c in binding.controllers)

    def _may_release(self, binding: Binding) -> bool:
        """Whether it is open for any of the weights if its dense storage can go."""
        found = False
        for weight in binding.weights.values():
            report = weight.controller.released
            if report is not None and not weight.is_released:
                if weight.name in report.released:  # another parameter was put in its place
                    report.again_dense(weight.name)
                found = found or report.kept.get(weight.name) == NOT_YET
        return found

    def _release(self, binding: Binding) -> bool:
        """Free the dense storage that this graph does not need; whether there was any."""
        binding.follow_structure()
        products = list({p.source: p for p in self._products(binding)}.values())
        outlines = [product.outline(binding.weights) for product in self._products(binding)]
        gm, _, _ = insert_sparse_matmuls(self.gm, self.sites, outlines)
        freed = release_unused(gm, products, binding.weights)
        if freed:  # what ran before will not run again
            binding.runs.clear()
            binding.run = None
        return freed

    def _compile_graph(self, gm: fx.GraphModule, extra: Sequence[Tensor]) -> Compiled:
        placeholders = gm.graph.find_nodes(op="placeholder")
        for node, value in zip(placeholders[len(placeholders) - len(extra) :], extra, strict=True):
            node.meta["example_value"] = self._fake(value)
        inputs = [node.meta.get("example_value") for node in placeholders]
        late = torch._guards.TracingContext.try_get() is None  # Dynamo is through with this graph
        with self._late_compilation() if late else nullcontext():
            return self._inner(gm, inputs)

    @contextmanager
    def _late_compilation(self) -> Iterator[None]:
        """What Dynamo sets up around a backend; guards on sizes are recorded, see _size_check."""
        from torch._dynamo.utils import preserve_rng_state

        # newer releases let other threads call compiled functions meanwhile
        session = getattr(torch.compiler, "_compile_session_context", nullcontext)

        shape_env = self._fake_mode.shape_env if self._fake_mode else None
        frozen = shape_env is not None and shape_env.frozen
        if shape_env is not None:
            if self._shape_guards is None:
                self._shape_guards = len(shape_env.guards)
            shape_env.frozen = False
        try:
            context = torch._guards.TracingContext(self._fake_mode)
            with session(), torch._guards.tracing(context), preserve_rng_state():
                yield
        finally:
            if shape_env is not None:
                shape_env.frozen = frozen

    def _size_check(self) -> Callable[[Sequence[Any]], bool] | None:
        """A check of guards on sizes that came up after Dynamo had installed its own."""
        shape_env = self._fake_mode.shape_env if self._fake_mode else None
        if shape_env is None or self._shape_guards is None:
            return None
        guards = shape_env.guards[self._shape_guards :]
        if not guards:
            return None
        placeholders = self.gm.graph.find_nodes(op="placeholder")
        values = [node.meta.get("example_value") for node in placeholders]
        sizes = [i for i, value in enumerate(values) if isinstance(value, torch.SymInt)]
        code = shape_env.produce_guards_expression([values[i] for i in sizes], guards=guards)
        if not code:
            return None
        logger.info("a later variant is right only where %s", code)
        return lambda args: bool(
            shape_env.evaluate_guards_expression(code, [args[i] for i in sizes])
        )

    def _fake(self, value: Tensor) -> Tensor:
        if self._fake_mode is None:
            return value
        return self._fake_mode.from_tensor(value, static_shapes=True)


def _identity_of(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[int, ...]]:
    """A function from arguments to the ids of those at ``positions``."""
    pick = picker(positions)
    return lambda args: tuple(map(id, pick(args)))


def _find_replaced(identity: Iterable[int]) -> None:
    """Let weights catch up whose module holds one of these parameters in place of their own."""
    wanted = set(identity)
    for controller in list(_known_controllers):
        for weight in controller.weights.values():
            try:
                current = weight.owner._parameters.get(weight.attribute)
            except WeightError:  # its module is gone; nothing here can be its parameter
                continue
            if id(current) in wanted and masked_weight_of(current) is not weight:  # type: ignore[arg-type]
                weight.bind()
