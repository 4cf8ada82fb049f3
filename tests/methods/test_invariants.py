"""What holds for every training method on models of any shape."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resu_compile.methods import training_method_names
from resu_compile.phase import Phase
from resu_compile.sparsity import keep_count
from tests.methods.runs import assert_sparse, make_run

STEPS = 14
EVERY = ("set", "rigl", "snfs", "mest", "gmp", "top_kast", "soft_shrinkage")
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


class Net(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, channels, 3, padding=1)
        self.up = nn.Linear(channels * 5, width)
        self.down = nn.Linear(width, 3)

    def forward(self, x):
        return self.down(self.up(self.conv(x).flatten(1)).tanh())


@settings(max_examples=45, deadline=None)
@given(
    name=st.sampled_from(training_method_names()),
    channels=st.integers(1, 5),
    width=st.integers(1, 9),
    sparsity=st.sampled_from([0.0, 0.31, 0.5, 0.75, 0.9, 0.97]),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    every=st.integers(1, 4),
)
def test_counts_zeros_and_finite_weights(name, channels, width, sparsity, optimizer, every):
    torch.manual_seed(channels * 100 + width)
    model = Net(channels, width)
    changes = {"cycles": 1} if name == "resu" else {}
    options = {"every": every} if name in EVERY else {}
    if name == "lottery":
        options = {"rate": 0.5}  # 7 levels at 97 %
    run = make_run(
        name,
        model,
        options=options,
        steps=STEPS,
        sparsity=sparsity,
        distribution="uniform",
        min_density=0.0,
        **changes,
    ).start()
    stepper = OPTIMIZERS[optimizer](model.parameters())
    inputs, target = torch.randn(4, 2, 5), torch.randn(4, 3)
    while not run.done:
        (model(inputs) - target).square().mean().backward()
        run.after_backward()
        stepper.step()
        stepper.zero_grad()
        run.after_step()
        if run.controller.phase is Phase.SPARSE:
            assert_sparse(run)
    run.finish()
    assert run.controller.phase is Phase.SPARSE or sparsity == 0.0
    assert_sparse(run, stepper)
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    weights = run.controller.weights.values()
    expected = sum(keep_count(weight.numel, sparsity) for weight in weights)
    found = sum(weight.nnz for weight in weights)
    if run.config.scope == "global":
        assert found == keep_count(sum(weight.numel for weight in weights), sparsity)
    elif name == "snfs":
        assert found == expected  # layers differ
    else:
        assert [w.nnz for w in weights] == [keep_count(w.numel, sparsity) for w in weights]
    stats = run.stats()
    assert stats.ever_share >= 1.0 - stats.sparsity - 1e-9
    assert 0.0 <= stats.training_flops <= 1.0 + 1e-9
