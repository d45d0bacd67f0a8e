"""The data set contract: names, splits, fingerprints, DomainBed's constructor."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from domainbed_ext.datasets import (
    DATASETS,
    environment_names,
    find_datasets,
    get_dataset_class,
    num_environments,
)
from domainbed_ext.datasets.base import (
    ArrayEnvironment,
    EnvSplit,
    MultipleDomainDataset,
    backbone_image_size,
    balanced_weights,
    resize_images,
    split_keys,
)
from domainbed_ext.errors import UsageError
from domainbed_ext.seeds import seed_hash

UPSTREAM_HPARAMS = {"data_augmentation": True, "class_balanced": False, "batch_size": 8}


def make_dataset(sizes=(10, 7), test_envs=(), num_classes=2):
    environments = [
        ArrayEnvironment(
            f"domain{i}", np.full((n, 3, 8, 8), i, np.uint8), np.arange(n) % num_classes
        )
        for i, n in enumerate(sizes)
    ]
    return MultipleDomainDataset(
        environments,
        [f"class{c}" for c in range(num_classes)],
        input_shape=(3, 8, 8),
        test_envs=test_envs,
        hparams={"data_augmentation": False},
    )


def test_names_are_in_the_documented_order():
    assert DATASETS == [
        *("Debug28", "Debug224", "RotatedDigits", "ColoredDigits", "EmojiDG", "EmojiDG6"),
        *("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"),
    ]


# DomainBed's class attributes: its sweeps, tables and checkpoints depend on them.
@pytest.mark.parametrize(
    ("name", "environments", "steps", "frequency"),
    [
        ("PACS", ["A", "C", "P", "S"], 5001, 300),
        ("VLCS", ["C", "L", "S", "V"], 5001, 300),
        ("OfficeHome", ["A", "C", "P", "R"], 5001, 300),
        ("TerraIncognita", ["L100", "L38", "L43", "L46"], 5001, 300),
        ("DomainNet", ["clip", "info", "paint", "quick", "real", "sketch"], 15001, 1000),
    ],
)
def test_benchmarks_have_upstreams_attributes(name, environments, steps, frequency):
    dataset_class = get_dataset_class(name)
    assert environment_names(name) == environments
    assert num_environments(name) == len(environments)
    assert (dataset_class.N_STEPS, dataset_class.CHECKPOINT_FREQ) == (steps, frequency)
    assert dataset_class.INPUT_SHAPE == (3, 224, 224)


def test_last_step_of_every_data_set_is_a_checkpoint():
    for name in ("Debug28", "RotatedDigits", "ColoredDigits", "EmojiDG"):
        dataset_class = get_dataset_class(name)
        assert (dataset_class.N_STEPS - 1) % dataset_class.CHECKPOINT_FREQ == 0


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"'RotatedDigit'.*did you mean RotatedDigits\?"):
        get_dataset_class("RotatedDigit")


def test_importing_the_package_is_light():
    code = (
        "import sys, domainbed_ext.datasets as d; d.DATASETS; "
        "print([m for m in ('torch', 'torchvision', 'PIL', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "side"), [("Debug28", 28), ("Debug224", 224)])
def test_debug_is_small_random_and_always_the_same(name, side):
    first, second = (get_dataset_class(name)(None, [0], UPSTREAM_HPARAMS) for _ in range(2))
    assert first.input_shape == (3, side, side)
    assert first.num_classes == 2
    assert [len(environment) for environment in first.datasets] == [16, 16, 16]
    for a, b in zip(first.datasets, second.datasets, strict=True):
        assert torch.equal(a.images(range(16)), b.images(range(16)))
        assert set(a.labels) == {0, 1}
    assert not torch.equal(first[0].images([0]), first[1].images([0]))


def test_environments_index_like_upstreams():
    dataset = get_dataset_class("Debug28")(None, [0], UPSTREAM_HPARAMS)
    x, y = dataset[1][5]
    assert x.shape == (3, 28, 28)
    assert x.dtype == torch.float32
    assert y == dataset[1].labels[5]
    assert len(dataset) == 3


# split_dataset(range(100), 20, seed 0) of DomainBed b93c22a; the same shuffle of 100 keys.
def test_split_keys_are_domainbeds():
    out, in_ = split_keys(np.arange(100), 20, seed=0)
    assert out[:10].tolist() == [26, 86, 2, 55, 75, 93, 16, 73, 54, 95]
    assert in_[:10].tolist() == [43, 62, 3, 71, 45, 48, 6, 99, 82, 76]


def test_splits_follow_domainbeds_seeds_and_cover_each_image_once():
    dataset = make_dataset(sizes=(10, 27))
    for env, n in enumerate((10, 27)):
        splits = dataset.splits(env, holdout_fraction=0.2, trial_seed=3)
        keys = list(range(n))
        np.random.RandomState(seed_hash(3, env)).shuffle(keys)
        assert list(splits) == ["in", "out"]
        assert splits["out"].keys.tolist() == keys[: int(n * 0.2)]
        assert splits["in"].keys.tolist() == keys[int(n * 0.2) :]
        assert splits["in"].name == f"env{env}_in"


def test_uda_split_is_cut_out_of_a_test_environments_in_split():
    dataset = make_dataset(sizes=(20, 20), test_envs=(1,))
    options = {"holdout_fraction": 0.2, "trial_seed": 0, "test_envs": (1,)}
    whole = dataset.splits(1, **options)
    parts = dataset.splits(1, uda_holdout_fraction=0.5, **options)
    # Upstream shuffles the in-split's positions with the same seed and takes the first half.
    positions = list(range(16))
    np.random.RandomState(seed_hash(0, 1)).shuffle(positions)
    assert parts["uda"].keys.tolist() == whole["in"].keys[positions[:8]].tolist()
    assert parts["in"].keys.tolist() == whole["in"].keys[positions[8:]].tolist()
    assert "uda" not in dataset.splits(0, uda_holdout_fraction=0.5, **options)


@pytest.mark.parametrize("option", ["holdout_fraction", "uda_holdout_fraction"])
def test_a_fraction_outside_its_range_is_refused(option):
    options = {"holdout_fraction": 0.2, "trial_seed": 0, option: 1.0}
    with pytest.raises(UsageError, match=rf"{option}=1\.0"):
        make_dataset().splits(0, **options)


@pytest.mark.parametrize("test_env", [2, -1])
def test_environment_out_of_range_is_refused(test_env):
    with pytest.raises(UsageError, match=rf"environment {test_env} .*0 domain0, 1 domain1"):
        make_dataset(test_envs=(test_env,))


def test_fingerprint_depends_on_names_and_counts():
    reference = make_dataset(sizes=(10, 7)).fingerprint()
    assert len(reference) == 16
    assert int(reference, 16) >= 0
    assert make_dataset(sizes=(10, 7)).fingerprint() == reference
    others = [make_dataset(sizes=(7, 10)), make_dataset(sizes=(10, 8))]
    others.append(make_dataset(sizes=(10, 7), num_classes=3))
    assert reference not in {other.fingerprint() for other in others}


def test_balanced_weights_give_every_class_the_same_mass():
    environment = ArrayEnvironment("a", np.zeros((6, 1, 2, 2), np.uint8), [0, 0, 0, 0, 2, 2])
    split = EnvSplit(environment, np.array([5, 0, 1, 2, 4]), "env0_in")
    # Upstream: 1 / (images of the class * number of classes): 1/(2*2) and 1/(3*2).
    assert balanced_weights(split).tolist() == pytest.approx([1 / 4, 1 / 6, 1 / 6, 1 / 6, 1 / 4])


@pytest.mark.parametrize(
    ("backbone", "size"),
    [
        ("deit_small_patch16_224", 224),
        ("vit_base_patch16_224.augreg_in21k_ft_in1k", 224),
        ("vit_dim128_stem8_48", 48),
        ("vit_small_patch14_dinov2", None),
        ("resnet50", None),
        ("", None),
    ],
)
def test_backbone_image_size(backbone, size):
    assert backbone_image_size({"backbone": backbone}) == size
    assert backbone_image_size({}) is None


def test_images_are_shrunk_and_enlarged():
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(2, 3, 64, 64)
    for size in (48, 96):
        environment = ArrayEnvironment("a", ramp, [0, 1], size=size)
        batch = environment.images([1, 0])
        assert batch.shape == (2, 3, size, size)
        assert batch.dtype == torch.uint8
        # A linear ramp stays one, up to rounding and the border.
        inner = batch[0, 0, 0, 4:-4].int()
        slope = 4 * 64 / size
        assert (inner.diff() - slope).abs().max() <= 1
    assert resize_images(ramp, 64) is ramp


def test_find_datasets_lists_what_is_there(tmp_path):
    found = find_datasets(tmp_path)
    assert [dataset.name for dataset in found] == DATASETS[:4]
    assert all(dataset.problem is None for dataset in found)
    (tmp_path / "PACS").mkdir()
    (tmp_path / "EmojiDG").mkdir()
    (tmp_path / "EmojiDG" / "emojidg.json").write_text("{", encoding="utf-8")
    problems = {d.name: d.problem for d in find_datasets(tmp_path) if d.problem}
    assert list(problems) == ["EmojiDG", "PACS"]
    assert "emojidg.json" in problems["EmojiDG"]
    assert str(tmp_path / "PACS") in problems["PACS"]
