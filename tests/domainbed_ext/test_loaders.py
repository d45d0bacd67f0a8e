"""Batches are a pure function of seed and step."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_ext.datasets.base import ArrayEnvironment, EnvSplit, FileEnvironment
from domainbed_ext.errors import UsageError
from domainbed_ext.loaders import EvalBatches, TrainBatches

NUM_IMAGES = 23


def jitter_batch(images, generator):
    """A train transform for in-memory images: pixel value plus a number below one per image."""
    noise = torch.rand(len(images), 1, 1, 1, generator=generator)
    return images.float() + noise


def plain_batch(images, generator):
    return images.float()


def jitter_image(image):
    """A train transform for image files, drawing from the global generator as torchvision does."""
    value = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    return value + torch.rand(())


@pytest.fixture
def memory_split():
    images = np.zeros((NUM_IMAGES + 5, 1, 2, 2), np.uint8)
    images += np.arange(NUM_IMAGES + 5, dtype=np.uint8)[:, None, None, None]
    environment = ArrayEnvironment("photo", images, np.arange(NUM_IMAGES + 5) % 3)
    keys = np.random.RandomState(0).permutation(NUM_IMAGES + 5)[:NUM_IMAGES]
    return EnvSplit(environment, keys, "env0_in")


@pytest.fixture
def file_split(tmp_path):
    paths = []
    for i in range(NUM_IMAGES):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (3, 3), (i, i, i)).save(paths[-1])
    environment = FileEnvironment("photo", paths, np.arange(NUM_IMAGES) % 3)
    return EnvSplit(environment, np.arange(NUM_IMAGES)[::-1].copy(), "env0_in")


def image_numbers(x):
    return x[:, 0, 0, 0].floor().long().tolist()


def all_numbers(batches):
    return [number for x, _ in batches for number in image_numbers(x)]


def take(split, number, **options):
    options = {"batch_size": 4, "seed": 7, "transform": jitter_batch, **options}
    return list(islice(TrainBatches(split, **options), number))


def assert_same(first, second):
    assert len(first) == len(second)
    for (x1, y1), (x2, y2) in zip(first, second, strict=True):
        assert torch.equal(x1, x2)
        assert torch.equal(y1, y2)


def test_an_epoch_covers_the_split_without_its_incomplete_batch(memory_split):
    batches = take(memory_split, 10)  # 23 // 4 = 5 batches an epoch
    epochs = [all_numbers(batches[i : i + 5]) for i in (0, 5)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
        assert set(epoch) <= set(memory_split.keys.tolist())
    assert epochs[0] != epochs[1]


def test_labels_belong_to_their_images(memory_split):
    for x, y in take(memory_split, 6):
        assert y.dtype == torch.int64
        assert y.tolist() == [number % 3 for number in image_numbers(x)]


@pytest.mark.parametrize("start", [1, 4, 5, 13])
def test_starting_at_a_step_gives_what_it_would_have_been(memory_split, start):
    assert_same(take(memory_split, 16)[start:], take(memory_split, 16 - start, start_step=start))


def test_batches_ignore_and_leave_the_global_generator(memory_split, file_split):
    for split, transform in ((memory_split, jitter_batch), (file_split, jitter_image)):
        torch.manual_seed(0)
        first = take(split, 3, transform=transform)
        state = torch.get_rng_state()
        torch.manual_seed(0)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(1)
        assert_same(first, take(split, 3, transform=transform))


def test_workers_change_nothing(file_split):
    torch.manual_seed(0)
    alone = take(file_split, 12, transform=jitter_image)
    state = torch.get_rng_state()
    helped = take(file_split, 12, transform=jitter_image, num_workers=2)
    assert_same(alone, helped)
    assert torch.equal(torch.get_rng_state(), state)
    late = take(file_split, 4, transform=jitter_image, num_workers=2, start_step=8)
    assert_same(alone[8:], late)


def test_images_of_a_batch_are_augmented_differently(memory_split, file_split):
    for split, transform in ((memory_split, jitter_batch), (file_split, jitter_image)):
        noise = torch.cat([x[:, 0, 0, 0] % 1 for x, _ in take(split, 10, transform=transform)])
        assert len(noise.unique()) == len(noise)


def test_seeds_and_splits_differ(memory_split):
    other = EnvSplit(memory_split.environment, memory_split.keys, "env1_in")
    orders = [
        [image_numbers(x) for x, _ in take(split, 5, seed=seed)]
        for split, seed in ((memory_split, 7), (memory_split, 8), (other, 7))
    ]
    assert orders[0] != orders[1]
    assert orders[0] != orders[2]


def test_weights_are_followed_and_resumable(memory_split):
    weights = torch.zeros(NUM_IMAGES)
    weights[[3, 17]] = torch.tensor([1.0, 3.0])
    batches = take(memory_split, 100, weights=weights, batch_size=20)
    numbers = all_numbers(batches)
    rare, frequent = memory_split.keys[[3, 17]].tolist()
    assert set(numbers) == {rare, frequent}
    # 2000 draws with probability 3/4: standard deviation 19.
    assert abs(numbers.count(frequent) - 1500) < 100
    assert_same(
        batches[60:62], take(memory_split, 2, weights=weights, batch_size=20, start_step=60)
    )


def test_wrong_number_of_weights_is_refused(memory_split):
    with pytest.raises(ValueError, match="3 weights for the 23 images"):
        take(memory_split, 1, weights=torch.ones(3))


def test_a_split_smaller_than_the_batch_is_refused(memory_split):
    with pytest.raises(
        UsageError,
        match=r"env0_in \(environment photo\) has 23 .*batch_size=24.*\"batch_size\": 23",
    ):
        take(memory_split, 1, batch_size=24)
    with pytest.raises(UsageError, match="batch_size=0"):
        take(memory_split, 1, batch_size=0)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_evaluation_sees_each_image_once_in_order(memory_split, batch_size):
    loader = EvalBatches(memory_split, batch_size=batch_size, transform=plain_batch)
    batches = list(loader)
    assert len(batches) == len(loader)
    numbers = all_numbers(batches)
    assert numbers == memory_split.keys.tolist()
    assert torch.cat([y for _, y in batches]).tolist() == memory_split.labels.tolist()


def test_evaluation_with_workers_is_the_same_and_repeatable(file_split):
    def loaded(num_workers):
        return EvalBatches(
            file_split, batch_size=5, transform=jitter_image, num_workers=num_workers
        )

    helped = loaded(2)
    assert_same(list(loaded(0)), list(helped))
    assert_same(list(loaded(0)), list(helped))


def test_an_empty_split_has_no_evaluation_batches(memory_split):
    empty = EnvSplit(memory_split.environment, np.empty(0, np.int64), "env0_out")
    assert list(EvalBatches(empty, batch_size=5, transform=plain_batch)) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_image_is_named_in_one_line(file_split, num_workers):
    path = file_split.environment.paths[7]
    with open(path, "wb") as file:
        file.write(b"not an image")
    loader = EvalBatches(file_split, batch_size=5, transform=jitter_image, num_workers=num_workers)
    with pytest.raises(UsageError) as caught:
        list(loader)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
