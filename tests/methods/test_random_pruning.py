import torch

from resu_compile.methods import RandomPruning


def test_score_comes_from_the_generator_alone(device):
    weight = torch.randn(30, 40, device=device, dtype=torch.float16)
    first = RandomPruning().score(weight, torch.Generator().manual_seed(1))
    torch.rand(5)
    again = RandomPruning().score(weight + 1, torch.Generator().manual_seed(1))
    other = RandomPruning().score(weight, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == weight.shape
    assert first.device == weight.device


def test_two_weights_get_two_draws():
    generator = torch.Generator().manual_seed(1)
    weight = torch.zeros(8, 8)
    method = RandomPruning()
    assert not torch.equal(method.score(weight, generator), method.score(weight, generator))


def test_every_place_is_as_likely():
    score = RandomPruning().score(torch.zeros(200, 200), torch.Generator().manual_seed(0))
    assert score.min() >= 0
    assert score.max() < 1
    assert abs(score.mean().item() - 0.5) < 0.01
