"""EmojiDG: label table, cache, code point folds."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from emoji_fakes import write_cache

from domainbed_ext.datasets import find_datasets
from domainbed_ext.datasets.emoji import EMOJI_CLASSES, EmojiDG, EmojiDG6, label_table
from domainbed_ext.errors import UsageError

HPARAMS = {"data_augmentation": False}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_cache(folder)
    return folder


def test_label_table_has_the_documented_classes():
    table = label_table()
    assert len(table) == 1039
    assert len({label.codepoint for label in table}) == 1039
    # Counts of the twemoji domain, which draws all of them.
    assert Counter(label.class_name for label in table) == dict(
        zip(
            EMOJI_CLASSES,
            (104, 90, 43, 62, 59, 64, 85, 58, 54, 42, 47, 53, 55, 69, 69, 85),
            strict=True,
        )
    )
    assert all(label.codepoint == label.codepoint.lower() for label in table)
    assert not any("fe0f" in label.codepoint or "-" in label.codepoint for label in table)


def test_environments_are_the_domains(data_dir):
    dataset = EmojiDG(data_dir, [1], HPARAMS)
    assert [e.name for e in dataset.datasets] == ["twemoji", "openmoji", "notomono", "symbola"]
    assert [len(e) for e in dataset.datasets] == [157] * 4
    assert dataset.input_shape == (3, 64, 64)
    assert dataset.num_classes == 16
    six = EmojiDG6(data_dir, [5], HPARAMS)
    assert [e.name for e in six.datasets][4:] == ["noto", "fluent3d"]


def test_images_belong_to_their_labels(data_dir):
    dataset = EmojiDG(str(data_dir), [1], HPARAMS)
    images = dataset[2].images([0, 50, 156])
    assert images.shape == (3, 3, 64, 64)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images[:, 0, 0, 0].tolist() == dataset[2].labels[[0, 50, 156]].tolist()


def test_the_backbones_size_is_what_it_gets(data_dir):
    dataset = EmojiDG(data_dir, [], {**HPARAMS, "backbone": "vit_dim128_stem8_48"})
    assert dataset.input_shape == (3, 48, 48)
    assert dataset[0].images([3]).shape == (1, 3, 48, 48)


@pytest.mark.parametrize("trial_seed", [0, 1, 4, 7])
def test_folds_follow_the_code_point_in_every_domain(data_dir, trial_seed):
    dataset = EmojiDG(data_dir, [1], HPARAMS)
    role_of: dict[str, str] = {}
    for env, environment in enumerate(dataset.datasets):
        splits = dataset.splits(env, trial_seed=trial_seed, test_envs=[1])
        assert list(splits) == ["in", "out", "unseen"]
        assert splits["unseen"].name == f"env{env}_unseen"
        keys = np.concatenate([split.keys for split in splits.values()])
        assert sorted(keys.tolist()) == list(range(len(environment)))
        for name, split in splits.items():
            for key in split.keys:
                codepoint = environment.codepoints[key]
                assert role_of.setdefault(codepoint, name) == name


def test_folds_are_ranks_of_a_hash_within_the_whole_class(data_dir):
    """By the rule itself: rank in the class modulo five; trial t tests fold t, validates t + 1."""
    classes: dict[str, list[str]] = {}
    for label in label_table():
        classes.setdefault(label.class_name, []).append(label.codepoint)
    fold = {}
    for codepoints in classes.values():
        codepoints.sort(key=lambda c: hashlib.sha256(f"emojidg:0:{c}".encode()).hexdigest())
        fold |= {codepoint: rank % 5 for rank, codepoint in enumerate(codepoints)}
    environment = (dataset := EmojiDG(data_dir, [], HPARAMS))[0]
    for trial_seed in (0, 3):
        splits = dataset.splits(0, trial_seed=trial_seed)
        folds = {
            name: {fold[environment.codepoints[key]] for key in split.keys}
            for name, split in splits.items()
        }
        assert folds["unseen"] == {trial_seed % 5}
        assert folds["out"] == {(trial_seed + 1) % 5}
        assert folds["in"] == {0, 1, 2, 3, 4} - folds["unseen"] - folds["out"]


def test_uda_split_comes_out_of_the_training_fold(data_dir):
    dataset = EmojiDG(data_dir, [1], HPARAMS)
    whole = dataset.splits(1, trial_seed=0, test_envs=[1])
    parts = dataset.splits(1, trial_seed=0, test_envs=[1], uda_holdout_fraction=0.5)
    assert len(parts["uda"]) == len(whole["in"]) // 2
    together = np.concatenate([parts["uda"].keys, parts["in"].keys])
    assert sorted(together) == sorted(whole["in"].keys)


def test_another_holdout_fraction_is_refused(data_dir):
    with pytest.raises(UsageError, match=r"holdout_fraction=0\.3.*0\.2"):
        EmojiDG(data_dir, [], HPARAMS).splits(0, holdout_fraction=0.3, trial_seed=0)


def test_absent_data_says_how_to_get_it(tmp_path):
    with pytest.raises(UsageError, match=r"no EmojiDG at .*scripts\.download EmojiDG, or"):
        EmojiDG(tmp_path, [], HPARAMS)


def test_absent_npm_domains_say_how_to_get_them(tmp_path):
    write_cache(tmp_path, domains=EmojiDG.ENVIRONMENTS, per_class=1, lacking=0)
    assert len(EmojiDG(tmp_path, [], HPARAMS)) == 4
    with pytest.raises(UsageError, match=r"lacks noto, fluent3d; run .*--npm"):
        EmojiDG6(tmp_path, [], HPARAMS)
    names = [found.name for found in find_datasets(tmp_path)]
    assert "EmojiDG" in names
    assert "EmojiDG6" not in names


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("shape", r"openmoji\.npy holds uint8 \(2, 64, 64, 3\), expected"),
        ("text", r"cannot read .*openmoji\.npy"),
        ("gone", r"cannot read .*openmoji\.npy"),
        ("format", r"emojidg\.json has format 99, expected 1"),
    ],
)
def test_damaged_cache_is_named(tmp_path, damage, message):
    folder = write_cache(tmp_path, per_class=1, lacking=0)
    array = folder / "openmoji.npy"
    if damage == "shape":
        np.save(array, np.zeros((2, 64, 64, 3), np.uint8))
    elif damage == "text":
        array.write_text("hello")
    elif damage == "gone":
        array.unlink()
    else:
        (folder / "emojidg.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UsageError, match=message):
        EmojiDG(tmp_path, [], HPARAMS)
    found = {dataset.name: dataset for dataset in find_datasets(tmp_path)}["EmojiDG"]
    assert found.num_images == 0
    assert re.search(message, found.problem)


def test_found_with_its_size(data_dir):
    found = {dataset.name: dataset for dataset in find_datasets(data_dir)}
    assert found["EmojiDG"].num_images == 4 * 157
    assert found["EmojiDG6"].num_images == 6 * 157
    assert found["EmojiDG"].path == data_dir / "EmojiDG"
