"""Accuracies with numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from domainbed_ext.datasets.base import ArrayEnvironment, EnvSplit
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
