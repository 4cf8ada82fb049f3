"""Freeing dense storage: what goes, what stays, what still works and what raises."""

from __future__ import annotations

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import resu_compile as resu
from resu_compile.errors import ArgumentTypeError, PhaseError
from resu_compile.runtime import dense_release
from resu_compile.runtime.released import ReleasedParameter, hollow, refill, released_value
from tests.compiling import Backend, no_recompile

CUDA = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


class Net(nn.Module):
    """q, k and v of one input; a weight stored transposed; a weight read densely as well."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(96, n, bias=n != 64) for n in (128, 64, 64))
        self.out = nn.Parameter(torch.randn(128, 96) * 0.1)
        self.last = nn.Linear(96, 64)

    def forward(self, x):
        h = self.q(x) * torch.cat([self.k(x), F.silu(self.v(x))], -1)
        return self.last(F.relu(h @ self.out)) + self.last.weight.mean()


FREED = {"q.weight", "k.weight", "v.weight", "out"}
X = torch.randn(4, 96)


def released(threshold=0.0, model=None, **options):
    """(model, controller, compiled call, backend, output before), after the releasing call."""
    model = resu.sparsify(model or Net(), 0.7, compile=False, **options)
    ctl = resu.controller(model)
    before = model(X).detach()
    backend = Backend(threshold=threshold)
    call = torch.compile(model, backend=backend)
    ctl.release_dense()
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)
    return model, ctl, call, backend, before


def stored(parameter):
    return parameter.untyped_storage().nbytes()


def test_memory_is_freed_and_results_stay():
    model, ctl, call, backend, before = released()
    report = ctl.released
    assert set(report.released) == FREED
    assert report.kept == {"last.weight": "a graph reads it densely: mean"}
    for name, parameter in model.named_parameters():
        freed = name in FREED
        assert stored(parameter) == (4 if freed else parameter.numel() * 4)
        assert isinstance(parameter, nn.Parameter)
    assert report.freed_bytes == 4 * 96 * (128 + 64 + 64 + 128)
    assert 0 < report.packed_bytes < report.freed_bytes
    assert "4 weights" in str(report)
    assert "last.weight: a graph reads it densely: mean" in str(report)
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)  # captured again
        with no_recompile():
            torch.testing.assert_close(call(X), before)
    assert backend.counts[-1] == 1
    (run,) = [b.run for b in backend.graphs[-1]._bindings.values()]
    assert len(run.variant.dropped) == 4
    assert sorted(len(product.sites) for product, _ in run.products) == [1, 1, 3]


def test_the_call_that_frees_holds_one_dense_weight_at_a_time(monkeypatch):
    # all of them at once would be the dense model again, beside the packed one
    alive, most = set(), []
    read = dense_release._Reader.__call__

    def watched(reader):
        value = read(reader)
        alive.add(StorageWeakRef(value.untyped_storage()))
        most.append(sum(not storage.expired() for storage in alive))
        return value

    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(6)])
    monkeypatch.setattr(dense_release._Reader, "__call__", watched)
    released(model=model)
    assert len(most) >= 6
    assert max(most) == 1


def test_through_inductor_and_sparsify():
    model = Net()
    resu.sparsify(model, 0.7, sparse_threshold=0.0, release_dense=True)
    ctl = resu.controller(model)
    assert set(ctl.released.kept) == FREED | {"last.weight"}
    before = F.linear(X, model.q.weight, model.q.bias)
    with torch.inference_mode():
        first = model(X)
        assert set(ctl.released.released) == FREED
        second = model(X)
    torch.testing.assert_close(first, second)
    with torch.no_grad():
        torch.testing.assert_close(model.q(X), before)


def test_as_an_option_of_the_backend():
    model = Net()
    options = {"sparsity": 0.7, "sparse_threshold": 0.0, "release_dense": True}
    call = torch.compile(model, backend="resu", options=options)
    with torch.no_grad():
        first, second = call(X), call(X)
    torch.testing.assert_close(first, second)
    assert set(resu.controller(call).released.released) == FREED
    with pytest.raises(ArgumentTypeError, match="release_dense: expected a bool, got 'yes'"):
        resu.sparsify(Net(), release_dense="yes")


def test_report_explain_and_export(tmp_path):
    model, ctl, _, _, before = released()
    assert str(resu.report(model)) == str(resu.report(copy.deepcopy(model)))
    assert "q.weight" in str(resu.explain(model, X))
    resu.export(model, (X,), tmp_path / "sparse.pt2")
    with torch.no_grad():
        torch.testing.assert_close(resu.load(tmp_path / "sparse.pt2")(X), before)
    assert set(ctl.released.released) == FREED
    assert stored(model.q.weight) == 4


def test_state_copies_and_eager_calls_see_the_values():
    model, ctl, call, _, before = released()
    twin = resu.sparsify(Net(), 0.7, compile=False)
    twin.load_state_dict(model.state_dict())
    twin_ctl = resu.controller(twin)
    twin_ctl.load_state_dict(ctl.state_dict())
    torch.testing.assert_close(twin(X), before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() > 4 * sum(p.numel() for p in model.parameters())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(isinstance(p, ReleasedParameter) for p in copied.parameters())
        assert resu.controller(copied).released is None
        torch.testing.assert_close(copied(X), before)  # with gradients
    with torch.no_grad():
        torch.testing.assert_close(model(X), before)  # weight by weight
        assert model.q.weight.abs().sum() > 0
        assert (model.q.weight == 0).float().mean() > 0.6
    assert model.q.weight.shape == (128, 96)
    assert "ReleasedParameter(q.weight, (128, 96)" in repr(model.q.weight)
    assert isinstance(model.q.weight, ReleasedParameter)


@pytest.mark.parametrize(
    ("what", "use"),
    [
        ("resurrect", lambda _, ctl: ctl.resurrect().__enter__()),
        ("prune", lambda _, ctl: ctl.prune(0.8)),
        ("set_phase", lambda _, ctl: ctl.set_phase("dense")),
        ("set_phase", lambda _, ctl: ctl.set_phase("resu")),
        ("commit", lambda _, ctl: ctl.commit()),
        ("load_state_dict", lambda model, _: model.load_state_dict(Net().state_dict())),
        ("load_state_dict", lambda _, ctl: ctl.load_state_dict(ctl.state_dict())),
        ("q.weight: expected a dense", lambda model, _: wr(model)),
        ("without gradients", lambda model, _: model(X)),
        ("without gradients", lambda model, _: model.q(X)),
        ("without gradients", lambda model, _: torch.compile(model, backend=Backend())(X)),
    ],
)
def test_what_needs_dense_weights_raises(what, use):
    model, ctl, call, _, before = released()
    with pytest.raises(PhaseError, match=what) as error:
        use(model, ctl)
    assert "restore_dense()" in str(error.value)
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)


def wr(model):
    """Write to a released weight."""
    with torch.no_grad():
        model.q.weight.mul_(2)


def test_restore_brings_everything_back():
    model, ctl, call, _, before = released()
    identities = [id(p) for p in model.parameters()]
    ctl.restore_dense()
    assert ctl.released is None
    assert [id(p) for p in model.parameters()] == identities
    assert all(type(p) is nn.Parameter for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    call(X).square().sum().backward()
    optimizer.step()
    for name, mask in ctl.masks.items():
        assert (model.get_parameter(name)[~mask] == 0).all()
    with ctl.resurrect(lr=0.1, init="normal", budget=0.2):
        pass
    with torch.no_grad():
        torch.testing.assert_close(call(X), model(X))
    model.load_state_dict(Net().state_dict())
    ctl.release_dense()
    with torch.no_grad():
        after = model(X)
        torch.testing.assert_close(call(X), after)
        torch.testing.assert_close(call(X), after)
    assert set(ctl.released.released) == FREED


def test_other_graphs_of_the_same_weights():
    """A second graph packs from the first one's form; one that reads the values runs eagerly."""
    model, ctl, call, _, before = released()
    with torch.no_grad():
        q = F.linear(X[:3], model.q.weight, model.q.bias)
        backend = Backend(threshold=0.0)
        alone = torch.compile(lambda x: model.q(x), backend=backend)
        torch.testing.assert_close(alone(X[:3]), q)
        odd = torch.compile(lambda x: x @ model.q.weight[:5].t(), backend=Backend(threshold=0.0))
        torch.testing.assert_close(odd(X), X @ model.state_dict()["q.weight"][:5].t())
        torch.testing.assert_close(call(X), before)


def test_a_dynamic_batch_has_one_graph():
    model, ctl, call, backend, before = released()
    with torch.no_grad():
        call(X)
        for rows in (2, 3, 9, 70):
            x = torch.randn(rows, 96)
            torch.testing.assert_close(call(x), model(x))


def test_a_dense_plan_keeps_dense_storage():
    model, ctl, call, _, before = released(threshold=1.0, model=small())
    assert not ctl.released.released
    assert set(ctl.released.kept.values()) == {"a graph reads it densely: linear"}
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)


def small():
    return nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 4))


def test_shared_storage_stays():
    model = Net()
    joint = torch.randn(192, 96)
    model.q.weight.data, model.k.weight.data = joint[:128], joint[128:]
    model, ctl, *_ = released(model=model)
    assert ctl.released.kept["q.weight"] == "its storage is shared with other tensors"
    assert set(ctl.released.released) == {"v.weight", "out"}


def test_what_tells_of_the_tensor_unpacks_nothing():
    parameter = nn.Parameter(torch.randn(4, 6))
    value, reads = parameter.detach().clone(), []
    hollow(parameter, "w", lambda: reads.append(1) or value.clone())
    assert (parameter.shape, parameter.dtype, parameter.numel()) == ((4, 6), torch.float32, 24)
    assert parameter.requires_grad
    assert parameter.is_leaf
    assert parameter.nbytes == 96
    assert not parameter.is_conj()
    assert not parameter._is_view()
    parameter.grad = None
    assert reads == []
    with torch.no_grad():
        assert torch.equal(parameter.T, value.T)
        assert torch.equal(parameter + 0, value)
    assert len(reads) == 2
    refill(parameter)
    assert type(parameter) is nn.Parameter
    assert torch.equal(parameter, value)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graphs_of_other_backends_unpack(backend):
    model, ctl, _, _, before = released()
    q = model.state_dict()["q.weight"]

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) * 2, torch.cat([self.inner.q.weight, self.inner.k.weight]).sum()

    call = torch.compile(Outer(), backend=backend, fullgraph=True)
    expected = q.sum() + model.state_dict()["k.weight"].sum()
    with torch.no_grad():
        for _ in range(2):
            product, total = call(X)
            torch.testing.assert_close(product, before * 2)
            torch.testing.assert_close(total, expected)
        ctl.restore_dense()
        torch.testing.assert_close(call(X)[0], before * 2)


def test_a_gradient_through_another_backend_raises():
    model, *_ = released()
    call = torch.compile(model, backend="aot_eager")
    failed = torch._dynamo.exc.BackendCompilerFailed
    with pytest.raises(failed, match="PhaseError: backward: expected a call without gradients"):
        call(X)


def test_a_value_of_no_released_weight_raises():
    with pytest.raises(PhaseError, match="freed in this process, got another tensor of shape"):
        released_value(torch.tensor(torch.nan).expand(3, 4))


def test_a_value_that_is_dense_again_is_copied():
    value = torch.randn(3, 4)
    assert torch.equal(released_value(value), value)
    assert released_value(value).data_ptr() != value.data_ptr()


def test_threads_that_call_at_once():
    model = resu.sparsify(Net(), 0.7, compile=False)
    with torch.no_grad():
        inputs = [torch.randn(rows, 96) for rows in (4, 5, 6, 7)]
        expected = [model(x) for x in inputs]
    call = torch.compile(model, backend=Backend(threshold=0.0))
    ctl = resu.controller(model)
    ctl.release_dense()

    @torch.no_grad()
    def use(number):
        return [call(inputs[number]) for _ in range(4)]

    with ThreadPoolExecutor(4) as pool:
        for value, results in zip(expected, pool.map(use, range(4)), strict=True):
            for result in results:
                torch.testing.assert_close(result, value)
    assert set(ctl.released.released) == FREED


def test_conversions_that_change_nothing_keep_it_released():
    model, ctl, call, _, before = released()
    assert model.to("cpu").cpu().float().to(torch.float32) is model
    assert set(ctl.released.released) == FREED
    assert all(isinstance(model.get_parameter(name), ReleasedParameter) for name in FREED)
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)


def test_a_cast_model_is_released_again():
    model, ctl, call, _, _ = released()
    dense = copy.deepcopy(model).half().float()
    packed_bytes = ctl.released.packed_bytes
    model.half()
    assert type(model.q.weight) is nn.Parameter
    assert ctl.released.released == {}
    assert ctl.released.packed_bytes == 0
    assert ctl.released.kept["q.weight"] == "no compiled inference call has used it yet"
    model.float()
    with torch.no_grad():
        expected = dense(X)
        for _ in range(3):  # where a graph of before fits again, it has the contents of now
            torch.testing.assert_close(call(X), expected, rtol=0, atol=1e-5)
    assert set(ctl.released.released) == FREED
    assert ctl.released.packed_bytes == packed_bytes
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_a_parameter_put_in_its_place_is_released_too():
    model, ctl, call, _, _ = released()
    model.q.load_state_dict(nn.Linear(96, 128).state_dict(), assign=True)
    with torch.no_grad():
        expected = model(X)
        for _ in range(2):
            torch.testing.assert_close(call(X), expected)
    assert isinstance(model.q.weight, ReleasedParameter)
    assert set(ctl.released.released) == FREED


def test_saving_a_traced_program_raises(tmp_path):
    model, ctl, *_ = released()
    with torch.no_grad():
        program = torch.export.export(model, (X,))
        with pytest.raises(PhaseError, match="resu_compile.export.model, inputs, path. writes"):
            torch.export.save(program, tmp_path / "dense.pt2")


def test_optimizers_pass_released_weights_by():
    model, ctl, call, _, before = released()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(call(X), before)


def test_release_and_the_wrong_phase():
    model = resu.sparsify(Net(), 0.7, compile=False)
    ctl = resu.controller(model)
    ctl.set_phase("dense")
    with pytest.raises(PhaseError, match="release_dense: expected phase sparse, got dense"):
        ctl.release_dense()
    ctl.set_phase("sparse")
    report = ctl.release_dense()
    assert ctl.release_dense() is report
    plain = ctl.release()
    assert type(plain.q.weight) is nn.Parameter


def test_made_plain_again_it_is_dense():
    model, ctl, _, _, before = released()
    plain = ctl.release()
    assert all(type(p) is nn.Parameter for p in plain.parameters())
    torch.testing.assert_close(plain(X), before)
    plain.load_state_dict(Net().state_dict())


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs an NVIDIA GPU")
def test_memory_goes_back_to_the_device():
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(4)))
    model = model.cuda().bfloat16()
    resu.sparsify(model, 0.9, sparse_threshold=0.5, release_dense=True)
    x = torch.randn(4, 2048, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = nn.Sequential(*model)(x)
        before = torch.cuda.memory_allocated()
        first, second = model(x), model(x)
        torch.cuda.synchronize()
    report = resu.controller(model).released
    assert len(report.released) == 4
    assert torch.cuda.memory_allocated() - before < report.packed_bytes - report.freed_bytes + 2**21
    torch.testing.assert_close(first, expected, rtol=0.02, atol=0.02)
    torch.testing.assert_close(second, expected, rtol=0.02, atol=0.02)
