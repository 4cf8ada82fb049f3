"""What only a GPU shows: fused and capturable optimizers, GradScaler, CUDA graphs, Triton."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

import resu_compile as resu
from resu_compile.backend import resu as resu_backend

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

DIM = 256


class Net(nn.Module):
    """Two linears and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(DIM, DIM)
        self.b = nn.Linear(DIM, DIM)
        self.w = nn.Parameter(torch.randn(DIM, DIM) * 0.05)

    def forward(self, x):
        return F.relu(self.b(F.relu(self.a(x)))) @ self.w


def make_net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().cuda()


def train(call, optimizer, steps, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    for _ in range(steps):
        x, y = torch.randn(2, 64, DIM, device="cuda", generator=generator).unbind(0)
        optimizer.zero_grad()
        (call(x) - y).square().mean().backward()
        optimizer.step()


def assert_zeros(model, optimizer=None):
    ctl = resu.controller(model)
    for name, mask in ctl.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any(), name
        for key, value in (optimizer.state[weight] if optimizer else {}).items():
            if isinstance(value, torch.Tensor) and value.shape == weight.shape:
                assert not value[~mask].any(), (name, key)


OPTIMIZERS = {
    "sgd-fused": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True
    ),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-3, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, fused=True),
    "adamw-capturable": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1, capturable=True),
    "rmsprop-foreach": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, foreach=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.dim() == 2], lr=1e-2),
}


@pytest.mark.parametrize("compile_model", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zeros_stay_through_all_phases(name, compile_model):
    model = resu.sparsify(make_net(), 0.7, compile=compile_model)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, 5)
    assert_zeros(model, optimizer)
    for options in ({"rule": "optimizer"}, {"freeze_active": True}, {"init": "normal"}):
        with resu.controller(model).resurrect(**options) as phase:
            train(model, optimizer, 3)
        assert phase.report.active == sum(
            int(m.sum()) for m in resu.controller(model).masks.values()
        )
        train(model, optimizer, 3)
        assert_zeros(model, optimizer)


def test_compiled_and_eager_training_agree():
    ends = []
    for compile_model in (False, True):
        model = resu.sparsify(make_net(), 0.7, compile=compile_model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        train(model, optimizer, 10)
        with resu.controller(model).resurrect(freeze_active=True):
            train(model, optimizer, 5)
        train(model, optimizer, 5)
        ends.append(model.state_dict())
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [False, True], ids=["for-loop", "fused"])
def test_overflowing_scaler_moves_nothing(fused):
    model = resu.sparsify(make_net(), 0.7)
    ctl = resu.controller(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    with ctl.resurrect(freeze_active=True):
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**60)
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        for step in range(40):
            with torch.autocast("cuda", torch.float16):
                loss = model(torch.randn(64, DIM, device="cuda")).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            skipped = scaler.get_scale()
            scaler.update()
            optimizer.zero_grad()
            if scaler.get_scale() < skipped:
                for name, weight in model.state_dict().items():
                    assert torch.equal(weight, before[name]), (step, name)
            else:
                break
        moved = [n for n, w in model.state_dict().items() if not torch.equal(w, before[n])]
        assert step > 0
        assert "a.weight" in moved
    assert_zeros(model, optimizer)


def test_cuda_graphs_take_new_masks_without_a_new_capture():
    torch._dynamo.reset()
    counters.clear()
    model = make_net()
    options = {"sparsity": 0.7, "mode": "reduce-overhead"}
    compiled = torch.compile(model, backend=resu_backend, options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    train(compiled, optimizer, 6)
    ctl = resu.controller(compiled)
    for _ in range(2):
        with ctl.resurrect(freeze_active=True):
            train(compiled, optimizer, 4)
        train(compiled, optimizer, 4)
        assert_zeros(model, optimizer)
    graphs = counters["stats"]["unique_graphs"]
    with ctl.resurrect(freeze_active=True):
        train(compiled, optimizer, 4)
    train(compiled, optimizer, 4)
    assert_zeros(model, optimizer)
    assert counters["stats"]["unique_graphs"] == graphs == 1
    reference = make_net()
    reference.load_state_dict(model.state_dict())
    x = torch.randn(64, DIM, device="cuda")
    torch.testing.assert_close(compiled(x), reference(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forced_sparse_inference_agrees_with_dense(mode, dtype):
    torch._dynamo.reset()
    model = make_net().to(dtype).eval()
    resu.sparsify(model, 0.9, sparse_threshold=0.0, mode=mode)
    reference = make_net().to(dtype).eval()
    reference.load_state_dict(model.state_dict())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}[dtype]
    with torch.no_grad():
        for rows in (1, 3, 16, 64):
            for _ in range(3):  # reduce-overhead records on the second call, replays on the third
                x = torch.randn(rows, DIM, device="cuda", dtype=dtype)
                got = model(x).clone()
            torch.testing.assert_close(got, reference(x), rtol=tolerance, atol=tolerance)


def test_masks_are_those_of_the_cpu():
    on_cpu, on_gpu = make_net().cpu(), make_net()
    for scope in ("layer", "global"):
        masks = []
        for model in (on_cpu, on_gpu):
            resu.sparsify(model, 0.7, scope=scope, compile=False)
            masks.append(resu.controller(model).masks)
            resu.controller(model).release()
        for name, mask in masks[0].items():
            assert torch.equal(mask, masks[1][name].cpu()), (scope, name)


def test_model_moves_to_the_gpu_with_its_masks():
    model = resu.sparsify(make_net().cpu(), 0.8)
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optimizer, 3)
    assert_zeros(model, optimizer)
    assert all(mask.is_cuda for mask in resu.controller(model).masks.values())


def test_export_on_the_gpu_loads_on_both(tmp_path):
    model = resu.sparsify(make_net().eval(), 0.9)
    x = torch.randn(8, DIM, device="cuda")
    resu.export(model, (x,), tmp_path / "net.pt2")
    expected = model(x)
    for device in ("cuda", "cpu"):
        loaded = resu.load(tmp_path / "net.pt2", device=device)
        got = loaded(x.to(device)).to("cuda")
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
