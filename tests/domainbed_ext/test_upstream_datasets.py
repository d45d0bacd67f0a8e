"""Our data sets as a DomainBed checkout trains on them."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams
from domainbed_ext.upstream_datasets import EmojiDGIsElsewhere, dataset_in_checkout

ERM = default_hparams("ERM", "RotatedDigits")


def test_digits_are_the_embedded_ones():
    dataset = dataset_in_checkout(get_dataset_class("RotatedDigits"))(None, [1], ERM)
    own = get_dataset_class("RotatedDigits")(None, [1], ERM)
    assert type(dataset).__name__ == "RotatedDigits"
    assert dataset.ENVIRONMENTS == own.ENVIRONMENTS
    assert (dataset.input_shape, dataset.num_classes) == (own.input_shape, own.num_classes)
    assert (dataset.N_STEPS, dataset.N_WORKERS) == (301, 0)
    for environment, expected in zip(dataset, own, strict=True):
        assert len(environment) == len(expected)
        assert torch.equal(environment[5][0], expected[5][0])
        assert environment[5][1] == expected[5][1]
    x, y = next(iter(DataLoader(dataset[0], batch_size=7)))
    assert x.shape == (7, 1, 16, 16)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)


def test_training_domains_are_augmented_from_the_global_generator():
    hparams = default_hparams("LTDR", "RotatedDigits")
    dataset = dataset_in_checkout(get_dataset_class("RotatedDigits"))(None, [1], hparams)
    assert torch.equal(dataset[1][3][0], dataset[1][3][0])
    torch.manual_seed(0)
    first, second = dataset[0][3][0], dataset[0][3][0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(dataset[0][3][0], first)


def test_folders_are_read_as_image_files(tmp_path):
    for domain, color in (("day", "white"), ("night", "black")):
        for name in ("cat", "dog"):
            folder = tmp_path / domain / name
            folder.mkdir(parents=True)
            for number in range(3):
                Image.new("RGB", (40, 30), color).save(folder / f"{number}.png")
    dataset_class = dataset_in_checkout(get_dataset_class(f"folder:{tmp_path}"))
    assert dataset_class.__name__ == f"folder:{tmp_path}"
    dataset = dataset_class(None, [0], {**ERM, "batch_size": 2})
    assert list(dataset.ENVIRONMENTS) == ["day", "night"]
    x, y = dataset[0][4]
    assert (x.shape, y) == ((3, 224, 224), 1)


def test_a_batch_that_no_domain_fills_is_refused():
    dataset_class = dataset_in_checkout(get_dataset_class("RotatedDigits"))
    with pytest.raises(UsageError, match=r"environment 0 has 240 training images, fewer than"):
        dataset_class(None, [1], {**ERM, "batch_size": 241})
    assert len(dataset_class(None, [1], {**ERM, "batch_size": 240})) == 6


def test_emojidg_says_where_it_is():
    with pytest.raises(UsageError, match=r"domainbed_ext\.scripts\.sweep"):
        _ = EmojiDGIsElsewhere.ENVIRONMENTS
    with pytest.raises(UsageError, match="would leak"):
        EmojiDGIsElsewhere("data", [0], {})
