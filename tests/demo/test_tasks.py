"""The data of the demo: held out means held out, and a seed fixes everything."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from resu_compile.demo.tasks import Bytes, Digits, Training, make_task, standard_library_files

TRAINING = Training(steps=40, batch_size=8, lr=1e-2, weight_decay=0.0)


@pytest.fixture(scope="module")
def digits():
    return Digits(TRAINING, width=8)


@pytest.fixture(scope="module")
def text():
    return Bytes(TRAINING, width=16, layers=1, heads=2, context=16, eval_batches=2)


@pytest.fixture(params=["digits", "text"])
def task(request):
    return request.getfixturevalue(request.param)


def test_seed_fixes_weights_and_batches(task):
    for a, b in zip(task.build(3).parameters(), task.build(3).parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in itertools.islice(zip(task.batches(3), task.batches(3), strict=True), 5):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    first, other = next(task.batches(3)), next(task.batches(4))
    assert not torch.equal(first[0], other[0])


def test_untrained_model_scores_like_chance(task):
    torch.manual_seed(0)
    classes = 10 if task.metric == "accuracy" else 256
    with torch.no_grad():
        score = task.evaluate(task.build(0))
    assert score.loss == pytest.approx(math.log(classes), rel=0.1)


def test_example_is_one_input(task):
    assert task.example().shape[0] == 1
    assert task.build(0)(task.example()).shape[0] == 1


def test_digits_are_split_without_overlap(digits):
    assert len(digits.train[1]) + len(digits.held_out[1]) == 1797
    held_out = {image.numpy().tobytes() for image in digits.held_out[0]}
    assert not held_out & {image.numpy().tobytes() for image in digits.train[0]}


def test_an_epoch_shows_no_image_twice(digits):
    epoch = itertools.islice(digits.batches(0), len(digits.train[1]) // TRAINING.batch_size)
    seen = [image.numpy().tobytes() for pixels, _ in epoch for image in pixels]
    assert len(seen) == len(set(seen))


def test_target_is_the_next_byte(text):
    tokens, target = next(text.batches(0))
    assert tokens.shape == target.shape == (8, 16)
    assert torch.equal(tokens[:, 1:], target[:, :-1])


def test_text_is_split_by_file(text):
    files = standard_library_files()
    total = sum(path.stat().st_size for path in files) + len(files) - 2  # newlines between files
    assert text.train.numel() + text.held_out.numel() == total
    assert not any("site-packages" in path.parts for path in files)


def test_model_does_not_look_ahead(text):
    model = text.build(0)
    tokens = text.example()
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    assert torch.equal(model(tokens)[:, :-1], model(changed)[:, :-1])


def test_learning_rate_warms_up_and_decays():
    rates = [TRAINING.lr_at(step) for step in range(TRAINING.steps)]
    assert max(rates) <= TRAINING.lr
    assert rates[0] == pytest.approx(TRAINING.lr / 2, rel=0.01)
    assert rates[-1] == pytest.approx(0.1 * TRAINING.lr, rel=0.05)


def test_sizes():
    assert make_task("digits", "small", "cpu").training.autocast is False
    large = make_task("bytes", "large", "cpu")
    assert sum(p.numel() for p in large.build(0).parameters()) == pytest.approx(10.8e6, rel=0.02)
