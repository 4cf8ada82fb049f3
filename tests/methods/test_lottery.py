import pytest
import torch

from resu_compile.errors import ArgumentError
from resu_compile.methods import Lottery
from tests.methods.runs import (
    WEIGHTS,
    assert_sparse,
    drive,
    loss_of,
    make_batches,
    make_model,
    make_run,
)


def test_the_sparsities_of_the_levels():
    assert Lottery().sparsities(0.2) == [0.0, 0.2]
    assert Lottery().sparsities(0.36) == pytest.approx([0.0, 0.2, 0.36])
    found = Lottery().sparsities(0.9)
    assert len(found) == 12
    assert found[-2:] == pytest.approx([1 - 0.8**10, 0.9])


def plain(model, *, level_steps, sparsities, rewind, lr):
    """Train, prune by global magnitude, rewind; SGD with momentum from 0 at each level."""
    batches, step = make_batches(), 0
    masks = {name: torch.ones_like(model.get_parameter(name)).bool() for name in WEIGHTS}
    for level in range(len(sparsities)):
        buffers = {p: torch.zeros_like(p) for p in model.parameters()}
        for inside in range(level_steps):
            if level == 0 and inside == rewind:
                ticket = {n: v.clone() for n, v in model.state_dict().items()}
            model.zero_grad()
            loss_of(model, batches[step % 5]).backward()
            for parameter, buffer in buffers.items():
                buffer.mul_(0.9).add_(parameter.grad)
                parameter.data -= lr * buffer
            for name in WEIGHTS:
                model.get_parameter(name).data *= masks[name]
            step += 1
        if level + 1 < len(sparsities):
            flat = torch.cat([model.get_parameter(n).detach().abs().flatten() for n in WEIGHTS])
            keep = int((1 - sparsities[level + 1]) * flat.numel())
            threshold = flat.sort(descending=True).values[keep - 1]
            for name in WEIGHTS:
                masks[name] = model.get_parameter(name).detach().abs() >= threshold
                ticket[name] *= masks[name]
            model.load_state_dict(ticket)
    return masks


@pytest.mark.parametrize("rewind", [0, 2])
def test_equals_the_plain_loop(rewind):
    options = {"rewind": rewind, "rate": 0.5}
    run = make_run("lottery", steps=15, sparsity=0.75, options=options, min_density=0.0)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1, momentum=0.9)
    drive(run, optimizer)
    model = make_model()
    masks = plain(model, level_steps=5, sparsities=[0.0, 0.5, 0.75], rewind=rewind, lr=0.1)
    for name in WEIGHTS:
        assert torch.equal(run.controller.masks[name], masks[name])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value)
    assert [update.step for update in run.updates] == [5, 10]
    assert run.span.start == 10
    assert_sparse(run, optimizer)


def test_an_optimizer_without_masked_weights_begins_anew_too():
    run = make_run("lottery", steps=6, sparsity=0.5, options={"rate": 0.5}).start()
    named = dict(run.model.named_parameters())
    optimizers = [
        torch.optim.AdamW([named.pop(name) for name in WEIGHTS], lr=0.1),
        torch.optim.AdamW(named.values(), lr=0.1),
    ]
    for _ in range(3):
        loss_of(run.model, make_batches()[0]).backward()
        run.after_backward()
        assert run.step == 0 or all(optimizer.state for optimizer in optimizers)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        run.after_step()
    assert not any(optimizer.state for optimizer in optimizers)


def test_an_early_end_prunes():
    run = drive(make_run("lottery"), until=3)
    run.finish()
    assert run.controller.sparsity == 0.75


def test_a_wrong_setting_is_named():
    with pytest.raises(ArgumentError, match="^rate: expected"):
        Lottery(rate=0.0)
    with pytest.raises(ArgumentError, match="^rewind: expected"):
        Lottery(rewind=-1)
    with pytest.raises(ArgumentError, match="^rewind: expected a step of the first level.*got 9"):
        make_run("lottery", sparsity=0.5, steps=25, options={"rewind": 9}).start()
    with pytest.raises(ArgumentError, match="^steps: expected at least 24, two for each of 12"):
        make_run("lottery", sparsity=0.9).start()
