"""Splits, batches and readers of the tasks, on data that were made for the test."""

from __future__ import annotations

import pickle
import re
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from resu_compile.errors import ArgumentError, ArgumentTypeError
from resu_compile.experiments import ExperimentTask, make_task, register_task, task_names
from resu_compile.experiments.tasks import registry, text
from resu_compile.experiments.tasks.image_folder import find_images, middle, random_part
from resu_compile.experiments.tasks.images import CIFAR_MEAN, CIFAR_STD, flip_and_crop, read_cifar
from resu_compile.experiments.tasks.recipe import relative_lr, splits_of
from resu_compile.experiments.tasks.resnet import resnet20, resnet50
from resu_compile.training.batches import BatchStream


def count(model):
    return sum(p.numel() for p in model.parameters())


def first_batches(task, number):
    stream = BatchStream(task.batches)
    return [stream.next() for _ in range(number)]


def assert_task(make, batches=3):
    """The same seed gives the same run, another seed another; both are scored alike."""
    one, two, other = make(seed=0), make(seed=0), make(seed=1)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[name])
    assert any(
        not torch.equal(value, other.model.state_dict()[name])
        for name, value in one.model.state_dict().items()
    )
    firsts = [first_batches(task, batches) for task in (one, two, other)]
    for a, b, c in zip(*firsts, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
        assert not torch.equal(a[0], c[0])
    loss = one.loss_fn(one.model, firsts[0][0])
    loss.backward()
    assert torch.isfinite(loss)
    one.model.eval()
    with torch.no_grad():
        validation, test = one.evaluate(one.model), one.test(one.model)
        seen = test if one.on_training is None else one.on_training(one.model)
        one.model(*one.example)
    assert set(validation) == set(test) == set(seen) >= {one.metric, "loss"}
    assert validation != test
    assert (seen != test) == (one.on_training is not None)
    return one


# -- registry --------------------------------------------------------------------------------
def test_names():
    assert {"bytes", "cifar10", "cifar100", "digits_cnn", "digits_mlp", "imagenet", "wikitext"} <= (
        set(task_names())
    )
    with pytest.raises(ArgumentError, match="task: expected one of bytes, cifar10"):
        make_task("mnist", steps=1, seed=0)
    with pytest.raises(ArgumentError, match="already registered"):
        register_task("bytes")(lambda **_: None)


def test_a_task_of_ones_own(monkeypatch):
    made = make_task("tests.experiments.linear_task:make", steps=3, seed=0)
    monkeypatch.setitem(registry._TASKS, "own", lambda steps, seed: made)  # noqa: ARG005
    assert make_task("own", steps=1, seed=0) is made
    with pytest.raises(ArgumentError, match=re.escape("cannot be made with (size=3)")):
        make_task("own", steps=1, seed=0, size=3)
    monkeypatch.setitem(registry._TASKS, "own", lambda **_: 3)
    with pytest.raises(ArgumentTypeError, match="expected an ExperimentTask, got a int"):
        make_task("own", steps=1, seed=0)


def test_both_splits_are_asked_for():
    made = make_task("tests.experiments.linear_task:make", steps=3, seed=0)
    parts = (made.model, made.optimizer, made.loss_fn, made.batches)
    with pytest.raises(ArgumentTypeError, match="evaluate: expected a function"):
        ExperimentTask(*parts)
    with pytest.raises(ArgumentTypeError, match="test: expected a function"):
        ExperimentTask(*parts, evaluate=made.evaluate)


@pytest.mark.parametrize("device", ["tpu:x", "cuda:99"])
def test_device(device):
    with pytest.raises(ArgumentError, match="device: expected"):
        make_task("digits_mlp", steps=1, seed=0, device=device)


def test_splits():
    parts = splits_of(101, 0.2, 0.6)
    assert [len(part) for part in parts] == [20, 60, 21]
    assert sorted(torch.cat(parts).tolist()) == list(range(101))
    assert torch.equal(parts[1], splits_of(101, 0.2, 0.6)[1])


def test_learning_rate():
    rates = [relative_lr(step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.2, rel=1e-3)
    assert max(rates) == rates[4] == pytest.approx(1.0, abs=0.01)
    assert rates[100] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


# -- data that every machine has ---------------------------------------------------------------
@pytest.mark.parametrize(("name", "weights"), [("digits_mlp", 26122), ("digits_cnn", 56554)])
def test_digits(name, weights):
    pytest.importorskip("sklearn")
    made = assert_task(partial(make_task, name, steps=10))
    assert count(made.model) == weights
    splits = [made.evaluate.args[0], made.test.args[0]]
    images = [split[0].flatten(1) for split in splits]
    train = torch.cat([batch[0].flatten(1) for batch in made.batches(0)])
    assert [len(part) for part in images] == [359, 360]
    assert len(train) == 1078 // 64 * 64
    seen = [{tuple(row) for row in part.tolist()} for part in (*images, train)]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


def test_bytes():
    made = assert_task(partial(make_task, "bytes", steps=10, size="tiny"))
    held, tested = made.evaluate.args[0], made.test.args[0]
    train = made.batches.args[0]
    assert not torch.equal(held[:1000], tested[:1000])
    assert not torch.equal(train[:1000], tested[:1000])
    bits = made.test(made.model)
    assert bits["bits per byte"] == pytest.approx(bits["loss"] / 0.6931471805599453)
    assert made.autocast is None


def test_the_large_gpt_is_the_one_of_the_evidence():
    size = text.SIZES["large"]
    assert (size.layers, size.width, size.context, size.batch_size) == (6, 384, 256, 64)


def test_score_of_bytes_by_hand():
    size = text.GPTSize(8, 1, 1, 4, 2, 1e-3, eval_batches=2)
    data = torch.arange(20, dtype=torch.uint8)
    model = torch.nn.Embedding(256, 256)
    found = text.bits_per_byte(data, size, model)
    windows = [data[start : start + 5].long() for start in (0, 5, 10, 15)]
    losses = [F.cross_entropy(model(w[:-1]), w[1:]).item() for w in windows]
    assert found["loss"] == pytest.approx(sum(losses) / 4, rel=1e-6)


# -- WikiText ----------------------------------------------------------------------------------
WORDS = {"train": "the cat sat . ", "valid": "a dog ran . ", "test": "one bird flew . "}


@pytest.mark.parametrize("suffix", ["raw", "tokens"])
def test_wikitext_files(tmp_path, suffix):
    for name, words in WORDS.items():
        (tmp_path / f"wiki.{name}.{suffix}").write_text(words * 100)
    make = partial(make_task, "wikitext", steps=10, folder=str(tmp_path), size="tiny")
    made = assert_task(make)
    assert bytes(made.test.args[0][:8].tolist()) == b"one bird"
    assert bytes(made.evaluate.args[0][:5].tolist()) == b"a dog"


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_wikitext_of_datasets(tmp_path, form):
    datasets = pytest.importorskip("datasets")
    parts = {
        split: datasets.Dataset.from_dict({"text": [WORDS[name], "\n"] * 100})
        for split, name in text.WIKI_NAMES.items()
    }
    if form == "saved":
        datasets.DatasetDict(parts).save_to_disk(tmp_path / "data")
    else:
        for split, part in parts.items():
            (tmp_path / "data").mkdir(exist_ok=True)
            part.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    found = text.read_wikitext(str(tmp_path / "data"))
    assert {s: bytes(t.tolist()) for s, t in found.items()} == {
        split: (WORDS[name] + "\n").encode() * 100 for split, name in text.WIKI_NAMES.items()
    }
    assert text.read_wikitext(str(tmp_path / "data"), max_bytes=7)["test"].numel() == 7


def test_wikitext_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(ArgumentError, match="folder: expected a folder with WikiText"):
        text.read_wikitext(str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ArgumentError, match=r"pip install resu-compile\[data\]"):
        text.read_wikitext(str(tmp_path))
    (tmp_path / "wiki.train.raw").write_text("x")
    with pytest.raises(ArgumentError, match=re.escape("expected wiki.valid.raw or wiki.valid")):
        text.read_wikitext(str(tmp_path))
    for name in ("valid", "test"):
        (tmp_path / f"wiki.{name}.raw").write_text("x" * 99)
    with pytest.raises(ArgumentError, match="train text: expected more than 33 bytes"):
        make_task("wikitext", steps=1, seed=0, folder=str(tmp_path), size="tiny")


# -- CIFAR -------------------------------------------------------------------------------------
def write_cifar(folder, name, per_file=12):
    numpy = pytest.importorskip("numpy")
    from resu_compile.experiments.tasks.images import CIFAR

    files = CIFAR[name]
    root = folder / files.folder
    root.mkdir(parents=True)
    random = numpy.random.default_rng(0)
    for file in (*files.train, files.test):
        data = {
            b"data": random.integers(0, 256, (per_file, 3072), dtype=numpy.uint8),
            files.labels: [i % files.classes for i in range(per_file)],
            b"filenames": [b"x.png"] * per_file,
        }
        (root / file).write_bytes(pickle.dumps(data, protocol=2))
    return root


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, name):
    root = write_cifar(tmp_path, name, per_file=20)
    made = assert_task(
        partial(make_task, name, steps=10, folder=str(tmp_path), width=4, batch_size=8), 2
    )
    images, labels = read_cifar(str(root), name, train=False)
    assert (images.shape, images.dtype) == ((20, 3, 32, 32), torch.uint8)
    stored = pickle.loads((root / ("test_batch" if name == "cifar10" else "test")).read_bytes())
    assert images[3, 1, 0, 2] == stored[b"data"][3][1024 + 2]  # green plane, first row
    assert labels.tolist() == list(range(20)) if name == "cifar100" else [*range(10)] * 2
    held = made.evaluate.args[0][0]
    assert len(held) == (10 if name == "cifar10" else 2)
    scaled = images[:, 0].float().mean() / 255
    assert made.test.args[0][0][:, 0].mean() == pytest.approx(
        (scaled.item() - CIFAR_MEAN[0]) / CIFAR_STD[0], rel=1e-4
    )


def test_cifar_reads_arrays_only(tmp_path):
    """A pickle may run anything; this one would write a file."""
    root = write_cifar(tmp_path, "cifar10")
    victim = tmp_path / "written"

    class Evil:
        def __reduce__(self):
            return (open, (str(victim), "w"))

    (root / "test_batch").write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(ArgumentError, match="has no place in a file of images"):
        read_cifar(str(tmp_path), "cifar10", train=False)
    assert not victim.exists()
    (root / "test_batch").write_bytes(pickle.dumps({b"labels": [1]}))
    with pytest.raises(ArgumentError, match=re.escape("expected data (images, 3072)")):
        read_cifar(str(tmp_path), "cifar10", train=False)
    (root / "test_batch").unlink()
    with pytest.raises(ArgumentError, match="got no test_batch"):
        read_cifar(str(tmp_path), "cifar10", train=False)


def test_flip_and_crop():
    images = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8) + 1
    found, labels = flip_and_crop((images, torch.tensor([4, 5])), 3, seed=1)
    again, _ = flip_and_crop((images, labels), 3, seed=1)
    other, _ = flip_and_crop((images, labels), 4, seed=1)
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert labels.tolist() == [4, 5]
    for before, after in zip(images, found, strict=True):
        border = F.pad(before, (4, 4, 4, 4))
        crops = [
            part[:, top : top + 8, left : left + 8]
            for part in (border, F.pad(before.flip(-1), (4, 4, 4, 4)))
            for top in range(9)
            for left in range(9)
        ]
        assert any(torch.equal(after, crop) for crop in crops)


def test_residual_networks_have_their_published_sizes():
    """ResNet-20 has 269 722 with zeros in its two shortcuts; ours are convolutions with norms."""
    assert count(resnet20(10)) == 269_722 + (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    with torch.device("meta"):
        assert count(resnet50(1000)) == 25_557_032
    assert resnet20(10, width=4)(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


# -- ImageNet ----------------------------------------------------------------------------------
@pytest.fixture
def image_folder(tmp_path):
    images = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    random = numpy.random.default_rng(0)
    for part, number in (("train", 20), ("val", 3)):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = random.integers(0, 256, (20 + i, 30, 3), dtype=numpy.uint8)
                images.fromarray(pixels).save(folder / f"{name}_{i}.JPEG")
            (folder / "notes.txt").touch()
    return tmp_path


def test_imagenet(image_folder):
    options = {"width": 4, "size": 32, "batch_size": 8, "workers": 0}
    make = partial(make_task, "imagenet", steps=4, folder=str(image_folder), **options)
    made = make(seed=0)
    classes, found = find_images(image_folder / "train")
    assert classes == ["n01440764", "n01443537"]
    assert len(found) == 40
    images, labels = first_batches(made, 1)[0]
    assert images.shape == (8, 3, 32, 32)
    assert set(labels.tolist()) <= {0, 1}
    assert len(made.batches.dataset) == 38
    made.loss_fn(made.model, (images, labels)).backward()
    made.model.eval()
    with torch.no_grad():
        assert set(made.evaluate(made.model)) == {"accuracy", "loss"}
        assert made.test(made.model) == made.test(made.model)


def test_an_image_folder_that_is_wrong(image_folder):
    with pytest.raises(ArgumentError, match="one folder for each class, got none"):
        find_images(image_folder / "test")
    with pytest.raises(ArgumentError, match="expected the 3 classes of the training images"):
        find_images(image_folder / "val", ["a", "b", "c"])
    for path in (image_folder / "val").rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(ArgumentError, match="expected images"):
        find_images(image_folder / "val")


def test_parts_of_an_image():
    assert middle(256, 512) == (16.0, 144.0, 240.0, 368.0)
    shares = []
    for _ in range(200):
        left, top, right, bottom = random_part(60, 40)
        assert 0 <= left < right <= 60
        assert 0 <= top < bottom <= 40
        shares.append((right - left) * (bottom - top) / 2400)
    assert min(shares) < 0.2
    assert max(shares) > 0.7
