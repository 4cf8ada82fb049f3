"""Loading without dense copies: the same outputs, memory that is really free, every way back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import resu_compile as resu
from resu_compile.errors import ArtifactError
from resu_compile.export import export_masked, load
from resu_compile.runtime import packed_cache
from tests.test_export import eager, ids, llama, masked

SHAPE = (96, 128)  # large enough to be packed: at least 64 * 64
SPARSITY = 0.95


class Attention(nn.Module):
    """q, k and v of one x, a shared weight, and one that a product and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(SHAPE[1], SHAPE[0]) for _ in range(3))
        self.out = nn.Linear(SHAPE[0], SHAPE[1])
        self.read_twice = nn.Linear(SHAPE[1], SHAPE[1], bias=False)
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(torch.sigmoid(self.q(x)) * self.k(x) + self.v(x))
        return self.conv(self.read_twice(y)) + self.read_twice.weight.sum()


def held_bytes(module: nn.Module) -> int:
    """Bytes of all storages that a module holds."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = Attention()
    masks = {
        name: torch.rand(p.shape) < 1 - SPARSITY
        for name, p in model.named_parameters()
        if p.dim() > 1
    }
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    path = tmp_path_factory.mktemp("saved") / "sparse.pt2"
    x = torch.randn(2, 4, SHAPE[1])
    export_masked(model, masks, (x,), path)
    return model, path, x, eager(model, x)


@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_no_dense_copy_is_left_and_the_numbers_stay(saved, threshold):
    model, path, x, want = saved
    program = load(path, sparse_threshold=threshold, release_dense=True)
    torch.testing.assert_close(program(x), want, rtol=1e-4, atol=1e-4)
    dense = {name for name, p in program.named_parameters() if p.dim() > 1}
    assert dense == {"read_twice.weight", "conv.weight"}  # more than matmuls read them
    sparse = {"q.weight", "k.weight", "v.weight", "out.weight"}
    sparse |= {"read_twice.weight"} if threshold == 0.5 else set()
    assert program.report.rewritten.keys() == sparse
    assert "packed with q.weight, k.weight, v.weight" in program.report.rewritten["k.weight"]
    # values, int32 columns and row starts, in place of the dense weights
    released = [model.get_parameter(f"{n}.weight") for n in ("q", "k", "v", "out")]
    packed = sum(int(w.count_nonzero()) * (w.itemsize + 4) + (w.shape[0] + 1) * 4 for w in released)
    kept = held_bytes(load(path, sparse_threshold=1.0))
    kept -= sum(w.numel() * w.itemsize for w in released)
    twice = model.read_twice.weight if threshold == 0.5 else torch.zeros(0, 0)
    extra = int(twice.count_nonzero()) * 8 + (twice.shape[0] + 1) * 4 * bool(twice.numel())
    assert held_bytes(program) == pytest.approx(kept + packed + extra, abs=64)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, on any copied program
def test_copies_state_and_devices(saved):
    _, path, x, want = saved
    program = load(path, sparse_threshold=0.5, release_dense=True)
    twin = copy.deepcopy(program)
    torch.testing.assert_close(twin(x), want, rtol=1e-4, atol=1e-4)
    state = program.state_dict()
    assert "q.weight" not in state
    twin.load_state_dict(state)
    torch.testing.assert_close(twin(x), want, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want, rtol=1e-4, atol=1e-4)
    assert twin.to("meta")(x.to("meta")).shape == want.shape


def test_a_damaged_bitmap_is_an_artifact_error(saved, monkeypatch):
    _, path, _, _ = saved
    inner = torch.export.load

    def damaged(file):
        program = inner(file)
        program.state_dict["out.weight_bits"].bitwise_xor_(1)
        return program

    monkeypatch.setattr(torch.export, "load", damaged)
    with pytest.raises(ArtifactError, match="expected bitmaps that fit their values"):
        load(path, release_dense=True)


def test_tokens_of_a_llama_without_dense_copies(tmp_path):
    """A step of greedy decoding after another, by the file and by the model."""
    model, masks = masked(llama)
    path, prompt = tmp_path / "m.pt2", ids(2, 7)
    sizes = ({0: Dim("batch", max=8), 1: Dim("tokens", max=32)},)
    export_masked(model, masks, (prompt,), path, dynamic_shapes=sizes)
    program = load(path, sparse_threshold=0.5, release_dense=True)

    def tokens(run):
        found = prompt
        with torch.no_grad():
            for _ in range(5):
                found = torch.cat([found, run(found).logits[:, -1:].argmax(-1)], 1)
        return found

    assert tokens(program).equal(tokens(model.eval()))


def test_export_of_a_released_model(tmp_path):
    """The file of a model whose dense weights are gone is that of the model before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SHAPE[1], SHAPE[0]), nn.ReLU(), nn.Linear(SHAPE[0], 8))
    resu.sparsify(model, SPARSITY, sparse_threshold=0.5)
    x = torch.randn(3, SHAPE[1])
    resu.export(model, (x,), tmp_path / "before.pt2")
    control = resu.controller(model)
    control.release_dense()
    with torch.no_grad():
        want = model(x)
    assert "0.weight" in control.released.released
    report = resu.export(model, (x,), tmp_path / "after.pt2")
    assert "0.weight" in report.rewritten
    assert "0.weight" in control.released.released  # still
    before, after = load(tmp_path / "before.pt2"), load(tmp_path / "after.pt2")
    assert before.metadata.weights == after.metadata.weights
    states = before.state_dict(), after.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    torch.testing.assert_close(after(x), want, rtol=1e-4, atol=1e-4)


def test_a_dense_weight_goes_before_the_next_is_packed(monkeypatch):
    """The most that is held at once is one layer more than the dense model."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4)))
    resu.sparsify(model, SPARSITY, sparse_threshold=0.5)
    control, dense = resu.controller(model), []
    inner = packed_cache.pack_with_room

    def counted(*args, **kwargs):
        dense.append(sum(not weight.is_released for weight in control.weights.values()))
        return inner(*args, **kwargs)

    monkeypatch.setattr(packed_cache, "pack_with_room", counted)
    control.release_dense()
    with torch.no_grad():
        model(torch.randn(3, 64))
        model(torch.randn(3, 64))
    assert dense == [4, 3, 2, 1]


# -- on the device ---------------------------------------------------------------------------
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_between_devices_without_dense_copies(saved):
    _, path, x, want = saved
    program = load(path, device="cuda", sparse_threshold=0.5, release_dense=True)
    assert program.report.rewritten.keys() >= {"q.weight", "k.weight", "v.weight"}
    torch.testing.assert_close(program(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(program.cpu()(x), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(program.cuda()(x.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_memory_of_the_device_is_free(tmp_path):
    """What is packed is all that is held."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(8))).bfloat16()
    resu.sparsify(model, 0.9, compile=False)
    x = torch.randn(1, 2048, dtype=torch.bfloat16)
    resu.export(model, (x,), tmp_path / "m.pt2")
    dense = sum(p.numel() * p.itemsize for p in model.parameters())
    torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()
    program = load(tmp_path / "m.pt2", device="cuda", sparse_threshold=0.5, release_dense=True)
    held = torch.cuda.memory_allocated() - before
    assert list(program.parameters()) == []
    assert held == pytest.approx(held_bytes(program), rel=0.05)
    assert held < 0.3 * dense
