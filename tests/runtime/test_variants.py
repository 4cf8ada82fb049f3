from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import resu_compile as resu
from resu_compile.config import CompileConfig
from resu_compile.errors import MaskChangedError
from resu_compile.kernels.plan import BUCKET_ROWS, Kernel
from resu_compile.runtime import sparse_products
from resu_compile.runtime.plans import Plan
from tests.compiling import Backend, eager_masking, no_recompile


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Net(nn.Module):
    """Two weights of one shape, so that mixing them up would not raise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = nn.Parameter(torch.randn(8, 8) * 0.3)

    def forward(self, x):
        return F.relu(self.first(x)) @ self.second


X = torch.randn(4, 8)


def sparse(sparsity=0.5, model=None, **options):
    model = resu.sparsify(model or Net(), sparsity, compile=False, **options)
    return model, resu.controller(model)


def compiled(model, **options):
    backend = Backend(**options)
    return torch.compile(model, backend=backend), backend


def gradients(call, *inputs):
    """Gradients of all parameters of what was called, by a loss that is not linear."""
    call(*(inputs or (X,))).square().sum().backward()


def assert_same_gradients(model, twin):
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")
        p.grad = q.grad = None


# -- variants ------------------------------------------------------------------------------------
def test_each_routing_compiles_once_and_toggling_captures_nothing():
    model, ctl = sparse()
    twin = copy.deepcopy(model)
    twin_ctl = resu.controller(twin)
    call, backend = compiled(model)
    gradients(call)
    gradients(twin)
    assert_same_gradients(model, twin)
    assert backend.counts == [1]
    with no_recompile():
        for _ in range(3):
            for phase in ("dense", "sparse"):
                ctl.set_phase(phase)
                twin_ctl.set_phase(phase)
                gradients(call)
                gradients(twin)
                assert_same_gradients(model, twin)
            for freeze_active in (True, False):
                with (
                    ctl.resurrect(lr=0.1, freeze_active=freeze_active),
                    twin_ctl.resurrect(lr=0.1, freeze_active=freeze_active),
                ):
                    gradients(call)
                    gradients(twin)
                    assert_same_gradients(model, twin)
    assert backend.counts == [3]  # ALL, ACTIVE, PRUNED; an unfrozen RESU phase is ALL


def test_a_variant_compiles_the_first_time_it_runs():
    model, ctl = sparse()
    call, backend = compiled(model)
    call(X)
    ctl.set_phase("dense")
    assert backend.counts == [1]
    call(X)
    assert backend.counts == [2]


def test_commits_that_keep_counts_compile_nothing():
    model, ctl = sparse()
    call, backend = compiled(model, threshold=0.0)
    with torch.no_grad():
        call(X)
    gradients(call)
    before = backend.counts
    with no_recompile():
        for _ in range(3):
            with ctl.resurrect(lr=0.1, init="normal", budget=0.3) as phase:
                pass
            assert phase.report.resurrected
            with torch.no_grad():
                torch.testing.assert_close(call(X), model(X))
    assert backend.counts == before


def test_changed_counts_compile_the_inference_variant_only():
    model, ctl = sparse()
    call, backend = compiled(model, threshold=0.0)
    with torch.no_grad():
        call(X)
    gradients(call)
    assert backend.counts == [1, 1]
    with no_recompile():
        ctl.prune(0.75)
        gradients(call)
        assert backend.counts == [1, 1]
        with torch.no_grad():
            torch.testing.assert_close(call(X), model(X))
    assert backend.counts == [2, 1]
    assert not backend.graphs[0].training
    assert backend.graphs[1].training


def test_inference_takes_the_sparse_kernel_in_the_sparse_phase_only(monkeypatch):
    model, ctl = sparse()
    call, backend = compiled(model, threshold=0.0)
    taken = []
    packed_of = sparse_products.packed_of

    def watched(members, formats):
        taken.extend((weight.name, transposed) for weight, transposed in members)
        return packed_of(members, formats)

    monkeypatch.setattr(sparse_products, "packed_of", watched)
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))
        assert set(taken) == {("first.weight", False), ("second", True)}
        taken.clear()
        for phase in ("dense", "resu"):
            if phase == "resu":
                ctl.set_phase("sparse")
            ctl.set_phase(phase)
            torch.testing.assert_close(call(X), model(X))
    assert taken == []
    assert backend.counts == [2]


def test_a_threshold_that_no_weight_reaches_keeps_the_dense_product(monkeypatch):
    model, _ = sparse(0.5)
    call, _ = compiled(model, threshold=0.6)
    monkeypatch.setattr(sparse_products, "packed_of", None)
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))


def test_auto_takes_the_buckets_that_measured_faster(monkeypatch):
    asked = []

    def faster(*args, **others):
        assert others == {"cuda_graphs": False, "release_dense": False, "pattern": None}
        asked.append(args)
        kernel = Kernel.CSR if len(asked) == 1 else Kernel.DENSE
        return Plan((kernel,) * len(BUCKET_ROWS))

    monkeypatch.setattr(sparse_products, "choose_plan", faster)
    model, ctl = sparse(0.5)
    call, backend = compiled(model, threshold="auto")
    with torch.no_grad():
        call(X)
        call(X)
    assert [args[1:] for args in asked] == [(8, 8, 0.5, torch.float32, 4, "auto")] * 2
    (graph,) = backend.graphs
    (run,) = [binding.run for binding in graph._bindings.values()]
    assert len(run.products) == 1
    ctl.prune(0.75)
    with torch.no_grad():
        call(X)
    assert [args[3] for args in asked[2:]] == [0.75, 0.75]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CompileConfig(), False),
        (CompileConfig(mode="default"), False),
        (CompileConfig(mode="reduce-overhead"), True),
        (CompileConfig(mode="max-autotune-no-cudagraphs"), False),
        (CompileConfig(inductor_options={"triton.cudagraphs": True}), True),
        (CompileConfig("auto", "reduce-overhead", {"triton.cudagraphs": False}), False),
    ],
)
def test_cuda_graphs_are_known_from_mode_and_options(config, expected):
    assert sparse_products.uses_cuda_graphs(config) is expected


def test_new_values_reach_the_sparse_kernel():
    model, _ = sparse()
    call, backend = compiled(model, threshold=0.0)
    optimizers = [
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.AdamW(model.parameters(), lr=0.1, fused=True),
    ]
    with torch.no_grad():
        call(X)
    for optimizer in optimizers:
        gradients(call)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch.testing.assert_close(call(X), model(X))
    model.load_state_dict(Net().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(call(X), model(X))
        assert (model.second[~resu.controller(model).masks["second"]] == 0).all()
    model.load_state_dict(Net().state_dict())
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))


# -- gradients -----------------------------------------------------------------------------------
def test_gradients_that_the_graph_masked_are_not_masked_again(monkeypatch):
    model, ctl = sparse()
    call, _ = compiled(model)
    with eager_masking(monkeypatch) as masked:
        for _ in range(3):
            gradients(call)
        assert masked == []
        with ctl.resurrect(freeze_active=True):
            gradients(call)
        assert masked == []
        gradients(model)
    assert len(masked) == 2


@pytest.mark.parametrize("order", ["before", "after", "both"])
def test_gradients_with_an_eager_part_are_masked_again(order, monkeypatch):
    model, ctl = sparse()
    call, _ = compiled(model)
    gradients(call)
    model.zero_grad()
    parts = {
        "before": lambda: model.second.square().sum() + call(X).square().sum(),
        "after": lambda: call(X).square().sum() + model.second.square().sum(),
        "both": lambda: model.second.sum() + call(X).square().sum() + model.second.square().sum(),
    }
    with eager_masking(monkeypatch) as masked:
        parts[order]().backward()
    assert len(masked) == 1
    for name, mask in ctl.masks.items():
        assert (model.get_parameter(name).grad[~mask] == 0).all()
    assert model.second.grad[ctl.masks["second"]].all()


def test_two_uses_in_one_backward():
    model, _ = sparse()
    twin = copy.deepcopy(model)
    call, _ = compiled(model)
    other = torch.compile(lambda x: torch.tanh(x @ model.second), backend=Backend())
    for _ in range(2):
        (call(call(X)).square().sum() + other(X).sum()).backward()
        (twin(twin(X)).square().sum() + torch.tanh(X @ twin.second).sum()).backward()
        assert_same_gradients(model, twin)


@pytest.mark.parametrize(
    "loss", [lambda flat, _: flat.sum(), lambda flat, y: flat.sum() + y.square().sum()]
)
def test_an_unmasked_gradient_of_another_compiled_graph_is_masked(loss):
    """The other graph's result passes through ours, so that its node stands behind our outputs."""
    model, ctl = sparse()
    plain = torch.compile(lambda x: x @ model.second, backend="aot_eager")
    ours = torch.compile(lambda h: (h.view(-1), h @ model.second), backend=Backend())
    for _ in range(2):
        loss(*ours(plain(X))).backward()
        assert (model.second.grad[~ctl.masks["second"]] == 0).all()
        model.zero_grad()


def test_retained_graphs_and_partial_gradients():
    model, ctl = sparse()
    call, _ = compiled(model)
    loss = call(X).square().sum()
    loss.backward(retain_graph=True)
    once = model.second.grad.clone()
    loss.backward()
    torch.testing.assert_close(model.second.grad, 2 * once)
    (grad,) = torch.autograd.grad(call(X).square().sum(), [model.second])
    torch.testing.assert_close(grad, once)


def test_outputs_that_are_views_or_need_no_gradient(monkeypatch):
    model, ctl = sparse()

    def call(x):
        y = model(x)
        return x.sum(), y.detach(), y.t()[0], {"y": y.view(-1)}

    run = torch.compile(call, backend=Backend())
    with eager_masking(monkeypatch) as masked:
        for _ in range(2):
            out = run(X)
            (out[2].sum() + out[3]["y"].square().sum()).backward()
    assert masked == []
    assert (model.second.grad[~ctl.masks["second"]] == 0).all()


def test_a_weight_that_the_graph_returns_is_the_parameters_own_memory():
    model, ctl = sparse()
    run = torch.compile(lambda x: (model(x), model.second.t()), backend=Backend())
    y, view = run(X)
    assert view.data_ptr() == model.second.data_ptr()
    (y.square().sum() + view.square().sum()).backward()
    assert (model.second.grad[~ctl.masks["second"]] == 0).all()
    assert (model.second.grad[ctl.masks["second"]] != 0).any()


def test_weights_stay_untouched_by_the_backward_pass():
    """AOTAutograd may use what it takes for its own memory again, after the last use."""

    class Cosine(Net):
        def forward(self, x):
            return self.first(x) @ self.second.cos()

    model, _ = sparse(model=Cosine())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients(torch.compile(model, backend=resu_backend()))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name


def resu_backend():
    from resu_compile.backend import backend_for

    return backend_for((1.0, None, ()))


# -- masks that change in between ----------------------------------------------------------------
@pytest.mark.parametrize(
    ("start", "change"),
    [
        ("sparse", lambda ctl: ctl.prune(0.8)),
        ("sparse", lambda ctl: ctl.set_phase("dense")),
        ("sparse", lambda ctl: ctl.set_phase("resu")),
        ("resu", lambda ctl: ctl.commit()),
        ("resu", lambda ctl: ctl.abandon()),
        ("dense", lambda ctl: ctl.set_phase("sparse")),
    ],
    ids=["prune", "dense", "resu", "commit", "abandon", "sparse"],
)
def test_a_backward_pass_through_another_mask_raises(start, change):
    model, ctl = sparse()
    call, _ = compiled(model)
    ctl.set_phase(start)
    gradients(call)
    loss = call(X).sum()
    change(ctl)
    with pytest.raises(MaskChangedError, match="run the forward pass again"):
        loss.backward()
    gradients(call)


# -- instances -----------------------------------------------------------------------------------
def test_instances_share_a_graph_and_never_masks():
    backend = Backend()
    models = [sparse(sparsity)[0] for sparsity in (0.5, 0.75)]
    models += [sparse(0.5, targets=[name])[0] for name in ("second", "first.weight")]
    plain = Net()
    calls = [torch.compile(model, backend=backend) for model in (*models, plain)]
    for _ in range(3):
        for model, call in zip((*models, plain), calls, strict=True):
            twin = copy.deepcopy(model)
            gradients(call)
            gradients(twin)
            assert_same_gradients(model, twin)
    assert len(backend.graphs) == 1
    assert backend.counts == [4]  # both masked, one or the other, none
    assert plain.second.grad is None


def test_instances_in_different_phases_alternate():
    backend = Backend(threshold=0.0)
    (a, a_ctl), (b, _) = sparse(0.5), sparse(0.5)
    call_a, call_b = torch.compile(a, backend=backend), torch.compile(b, backend=backend)
    a_ctl.set_phase("dense")
    with torch.no_grad():
        a.second.fill_(1.0)
        for _ in range(2):
            torch.testing.assert_close(call_a(X), a(X))
            torch.testing.assert_close(call_b(X), b(X))
    assert len(backend.graphs) == 1


def test_two_models_in_one_graph():
    (a, a_ctl), (b, _) = sparse(0.5), sparse(0.75)
    backend = Backend()
    call = torch.compile(lambda x: a(x) + b(x), backend=backend)
    twin_a, twin_b = copy.deepcopy(a), copy.deepcopy(b)
    twin_ctl = resu.controller(twin_a)
    with no_recompile() if backend.graphs else torch.enable_grad():
        for phase in ("sparse", "dense", "sparse"):
            a_ctl.set_phase(phase)
            twin_ctl.set_phase(phase)
            gradients(call)
            gradients(lambda x: twin_a(x) + twin_b(x))
            assert_same_gradients(a, twin_a)
            assert_same_gradients(b, twin_b)
    assert backend.counts == [2]


def test_a_model_that_goes_away_is_not_kept_alive():
    model, ctl = sparse()
    backend = Backend()
    call = torch.compile(model, backend=backend)
    gradients(call)
    gone = weakref.ref(model.second)
    (graph,) = backend.graphs
    del call, model, ctl
    gc.collect()
    assert gone() is None
    assert not graph._bindings


# -- models that change --------------------------------------------------------------------------
def test_a_parameter_put_in_its_place_is_masked():
    model, ctl = sparse()
    call, backend = compiled(model)
    gradients(call)
    model.first.weight = nn.Parameter(torch.randn(8, 8))
    model.second = nn.Parameter(torch.randn(8, 8))
    mask = ctl.masks["second"]
    gradients(call)
    assert (model.second[~mask] == 0).all()
    assert (model.second.grad[~mask] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))


def test_release_and_sparsify_again():
    model, ctl = sparse()
    call, _ = compiled(model)
    gradients(call)
    mask = ctl.masks["second"]
    ctl.release()
    model.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    gradients(call)
    assert (model.second.grad[~mask] != 0).any()
    model.zero_grad()
    _, again = sparse(0.25, model)
    gradients(call)
    assert (model.second.grad[~again.masks["second"]] == 0).all()
    assert (model.second[~again.masks["second"]] == 0).all()


def test_masks_that_moved_are_taken_from_where_they_are():
    model, ctl = sparse()
    call, _ = compiled(model)
    gradients(call)
    weight = ctl.weights["second"]
    weight.bits = weight.bits.clone()  # as .to(device) does, without a change of epoch
    old = ctl.masks["second"]
    weight.bits.bitwise_not_()
    model.zero_grad()
    gradients(call)
    assert (model.second.grad[old] == 0).all()


def test_weights_are_frozen_and_thawed():
    model, ctl = sparse()
    call, backend = compiled(model)
    gradients(call)
    model.second.requires_grad_(False)
    model.zero_grad()
    gradients(call)
    assert model.second.grad is None
    model.requires_grad_(False)
    torch.testing.assert_close(call(X), model(X))
    assert backend.graphs[0].training  # torch 2.11 runs it on, 2.13 captures two more
    model.requires_grad_(True)
    gradients(call)
    assert (model.second.grad[~ctl.masks["second"]] == 0).all()


def test_functional_call_uses_the_tensors_it_is_given():
    model, _ = sparse()
    tensors = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    expected = F.relu(F.linear(X, tensors["first.weight"], tensors["first.bias"]))
    call = torch.compile(lambda t, x: torch.func.functional_call(model, t, (x,)), backend=Backend())
    torch.testing.assert_close(call(tensors, X), expected @ tensors["second"])


# -- dynamic shapes ------------------------------------------------------------------------------
def sizes():
    return [torch.randn(n, 8) for n in (4, 5, 9, 2, 33, 16)]


@pytest.mark.parametrize("training", [True, False])
def test_sizes_do_not_recompile_in_any_variant(training):
    model, ctl = sparse()
    call, backend = compiled(model, threshold=0.0)
    twin = copy.deepcopy(model)
    twin_ctl = resu.controller(twin)
    with torch.set_grad_enabled(training):
        call(X)
        call(torch.randn(7, 8))  # Dynamo sees that the size is dynamic
        with no_recompile():
            for phase in ("sparse", "dense", "resu"):
                for controller in (ctl, twin_ctl):
                    if phase == "resu":
                        controller.set_phase("sparse")
                    controller.set_phase(phase)
                for x in sizes():
                    torch.testing.assert_close(call(x), twin(x))
                    if training:
                        gradients(call, x)
                        gradients(twin, x)
                        assert_same_gradients(model, twin)
    assert len(backend.graphs) == 2
    assert backend.counts[1] <= 3


def test_a_late_variant_that_is_right_for_some_sizes_only_runs_eagerly_for_others():
    compiles = []

    def inner(gm, inputs):
        """The second compilation relies on the size it sees."""
        compiles.append(gm)
        compiled = aot_eager(gm, inputs)
        if len(compiles) < 3:
            return compiled
        (position,) = [i for i, v in enumerate(inputs) if isinstance(v, torch.SymInt)]
        assert inputs[position] > 6  # a guard that Dynamo does not see any more

        def right_for_some(*args):
            assert args[position] > 6
            return compiled(*args)

        return right_for_some

    model, ctl = sparse()
    twin = copy.deepcopy(model)
    backend = Backend(inner=inner)
    call = torch.compile(model, backend=backend)
    gradients(call)
    gradients(call, torch.randn(7, 8))
    model.zero_grad()
    ctl.set_phase("dense")
    resu.controller(twin).set_phase("dense")
    for x in (torch.randn(7, 8), *sizes()):
        gradients(call, x)
        gradients(twin, x)
        assert_same_gradients(model, twin)
    variant = [v for v in backend.graphs[1]._variants.values() if v.holds is not None]
    assert len(variant) == 1
    assert len(compiles) == 3


def test_a_late_compilation_leaves_the_random_state():
    def inner(gm, inputs):
        torch.rand(3)
        return aot_eager(gm, inputs)

    model, ctl = sparse()
    call = torch.compile(model, backend=Backend(inner=inner))
    call(X)
    ctl.set_phase("dense")
    before = torch.get_rng_state()
    call(X)
    assert torch.equal(torch.get_rng_state(), before)


# -- graphs of other kinds -----------------------------------------------------------------------
def test_graphs_without_masked_weights_and_without_parameters():
    backend = Backend()
    plain = nn.Linear(8, 8)
    gradients(torch.compile(lambda x: plain(x), backend=backend))
    assert plain.weight.grad.all()
    assert torch.compile(lambda x: x + 1, backend=backend)(X).shape == X.shape
    assert backend.counts == [1, 1]


def test_weights_outside_of_the_graph_get_their_zeros_too():
    class Broken(Net):
        @torch._dynamo.disable
        def rest(self, x):
            return x @ self.second

        def forward(self, x):
            return self.rest(F.relu(self.first(x)))

    model, ctl = sparse(model=Broken())
    call, _ = compiled(model)
    call(X)
    model.load_state_dict(Broken().state_dict())
    call(X)
    assert (model.second[~ctl.masks["second"]] == 0).all()


def test_a_step_that_raised_is_recovered_from():
    model, ctl = sparse()
    call, _ = compiled(model)
    with ctl.resurrect(lr=0.1, init="normal"):
        gradients(call)
        model.first.bias.grad = torch.zeros(8).to_sparse()  # fails half way through the step
        with pytest.raises(RuntimeError):
            torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1, foreach=False).step()
        torch.testing.assert_close(call(X), model(X))
        assert (model.second != 0).all()


def test_a_pruned_parameter_that_is_only_added_is_named(caplog):
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.offsets = nn.Parameter(torch.randn(4, 8))

        def forward(self, x):
            return self.first(x) + self.offsets

    model = Added()
    resu.sparsify(model, 0.5, compile=False)
    torch.compile(model, backend=Backend())(torch.randn(4, 8))
    (message,) = [record.getMessage() for record in caplog.records if "pruned" in record.message]
    assert message.startswith("offsets was pruned")
    assert "add" in message
