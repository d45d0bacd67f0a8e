"""Accuracies with numbers worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from domainbed_ext import decoding_workers
from domainbed_ext.datasets.base import ArrayEnvironment, EnvSplit, FileEnvironment
from domainbed_ext.errors import UsageError
from domainbed_ext.evaluation import evaluate, predicted_classes
from domainbed_ext.loaders import EvalBatches


class ReadsTheAnswer(nn.Module):
    """Predicts the class written into the first pixel."""

    def __init__(self, num_classes):
        super().__init__()
        self.num_classes = num_classes
        self.modes = []

    def predict(self, x):
        self.modes.append((self.training, torch.is_inference_mode_enabled()))
        answers = x[:, 0, 0, 0].long()
        if self.num_classes == 1:
            return answers[:, None].float() - 0.5
        return nn.functional.one_hot(answers, self.num_classes).float()


def loader(answers, labels, batch_size=2):
    images = np.asarray(answers, np.uint8)[:, None, None, None] * np.ones((1, 1, 2, 2), np.uint8)
    environment = ArrayEnvironment("photo", images, labels)
    split = EnvSplit(environment, np.arange(len(labels)), "env0_in")
    return EvalBatches(split, batch_size=batch_size, transform=lambda x, _: x.float())


def test_accuracy_and_mean_class_accuracy():
    # Class 0: 3 of 4 right, class 2: 0 of 1, class 1 does not occur.
    loaders = {"env0_in": loader([0, 0, 0, 2, 0], [0, 0, 0, 0, 2])}
    accuracies = evaluate(ReadsTheAnswer(3), loaders, device="cpu", num_classes=3)
    assert accuracies == {
        "env0_in_acc": pytest.approx(3 / 5),
        "env0_in_class_acc": pytest.approx((3 / 4 + 0) / 2),
    }
    assert all(type(value) is float for value in accuracies.values())


def test_one_output_means_its_sign():
    loaders = {"env1_out": loader([0, 1, 1, 1], [0, 0, 1, 1])}
    accuracies = evaluate(ReadsTheAnswer(1), loaders, device="cpu", num_classes=2)
    assert accuracies == {"env1_out_acc": 3 / 4, "env1_out_class_acc": 3 / 4}
    # Zero is not above zero.
    assert predicted_classes(torch.tensor([[0.0], [1e-3], [-1.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_and_nothing_is_recorded(training):
    algorithm = ReadsTheAnswer(2).train(training)
    evaluate(algorithm, {"a": loader([0, 1], [0, 1])}, device="cpu", num_classes=2)
    assert algorithm.modes == [(False, True)]
    assert algorithm.training is training


def test_mode_is_restored_after_an_error():
    algorithm = ReadsTheAnswer(2).train()
    algorithm.predict = None
    with pytest.raises(TypeError):
        evaluate(algorithm, {"a": loader([0], [0])}, device="cpu", num_classes=2)
    assert algorithm.training


def test_an_empty_split_has_no_accuracy():
    loaders = {"env0_out": loader(np.empty(0), []), "env0_in": loader([1], [1])}
    accuracies = evaluate(ReadsTheAnswer(2), loaders, device="cpu", num_classes=2)
    assert set(accuracies) == {"env0_in_acc", "env0_in_class_acc"}


class CountsImages(nn.Module):
    """Notes the first pixel of every image it predicts, and the sizes of the batches."""

    def __init__(self):
        super().__init__()
        self.seen, self.sizes = [], []

    def predict(self, x):
        assert torch.is_inference_mode_enabled()
        assert not self.training
        self.seen += x[:, 0, 0, 0].long().tolist()
        self.sizes.append(len(x))
        return nn.functional.one_hot(torch.zeros(len(x), dtype=torch.long), 3).float()


class LoggedFiles(FileEnvironment):
    """Writes the number of each image that is decoded to a file, whichever process does it."""

    def __init__(self, log, *arguments):
        super().__init__(*arguments)
        self.log = str(log)

    def image(self, index):
        number = int(Path(self.paths[index]).stem)
        with open(self.log, "ab", buffering=0) as file:  # appended whole
            file.write(b"%d\n" % number)
        return super().image(index)


def splits_of_files(tmp_path, counts):
    """Environments of image files numbered on, each cut into "in" and "out"."""
    splits, first = {}, 0
    for env, count in enumerate(counts):
        numbers = list(range(first, first + count))
        first += count
        paths = [str(tmp_path / f"{number}.png") for number in numbers]
        for number, path in zip(numbers, paths, strict=True):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(path)
        environment = LoggedFiles(tmp_path / "log", str(env), paths, np.zeros(count))
        for kind, keys in (("in", np.arange(1, count)), ("out", np.arange(1))):
            splits[f"env{env}_{kind}"] = EnvSplit(environment, keys, f"env{env}_{kind}")
    return splits


def first_pixel(image):
    return torch.full((1, 1, 1), float(image.getpixel((0, 0))[0]))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_each_image_is_decoded_and_predicted_once(tmp_path, num_workers):
    splits = splits_of_files(tmp_path, [11, 4, 8])
    loaders = {
        name: EvalBatches(split, batch_size=4, transform=first_pixel, num_workers=num_workers)
        for name, split in splits.items()
    }
    for expected in (1, 2):  # evaluations
        algorithm = CountsImages()
        accuracies = evaluate(algorithm, loaders, device="cpu", num_classes=3)
        # Splits of 10, 1, 3, 1, 7 and 1 images, in batches of 4.
        assert algorithm.seen == [*range(1, 11), 0, *range(12, 15), 11, *range(16, 23), 15]
        assert algorithm.sizes == [4, 4, 2, 1, 3, 1, 4, 3, 1]
        assert list(accuracies)[::2] == [f"{name}_acc" for name in splits]
        decoded = (tmp_path / "log").read_text().split()
        assert sorted(map(int, decoded)) == sorted([*range(23)] * expected)


def test_processes_are_started_once_for_all_splits(tmp_path, monkeypatch):
    started = []
    real = decoding_workers.DataLoader

    def counting(*arguments, **options):
        started.append(options["num_workers"])
        return real(*arguments, **options)

    monkeypatch.setattr(decoding_workers, "DataLoader", counting)
    loaders = {
        name: EvalBatches(split, batch_size=4, transform=first_pixel, num_workers=2)
        for name, split in splits_of_files(tmp_path, [5, 3]).items()
    }
    evaluate(CountsImages(), loaders, device="cpu", num_classes=3)
    assert started == [2]


def test_a_corrupt_image_ends_an_evaluation_with_its_name(tmp_path):
    loaders = {
        name: EvalBatches(split, batch_size=4, transform=first_pixel, num_workers=2)
        for name, split in splits_of_files(tmp_path, [5, 3]).items()
    }
    (tmp_path / "6.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match=r"6\.png"):
        evaluate(CountsImages(), loaders, device="cpu", num_classes=3)


def test_batch_size_does_not_matter():
    answers = np.random.RandomState(0).randint(0, 4, 50)
    labels = np.random.RandomState(1).randint(0, 4, 50)
    results = [
        evaluate(
            ReadsTheAnswer(4), {"a": loader(answers, labels, size)}, device="cpu", num_classes=4
        )
        for size in (1, 7, 50)
    ]
    assert results[0] == results[1] == results[2]
    assert results[0]["a_acc"] == (answers == labels).mean()
