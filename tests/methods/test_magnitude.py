import torch

from resu_compile.methods import Magnitude
from resu_compile.sparsity import topk_mask


def test_score_is_the_absolute_value():
    weight = torch.tensor([[-3.0, 0.5], [0.0, 2.0]], requires_grad=True)
    score = Magnitude().score(weight, torch.Generator())
    assert score.tolist() == [[3.0, 0.5], [0.0, 2.0]]
    assert not score.requires_grad
    assert topk_mask(score, 2).tolist() == [[True, False], [False, True]]
