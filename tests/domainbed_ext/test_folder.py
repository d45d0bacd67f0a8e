"""Image folders, manifests and the benchmarks read from them."""

from __future__ import annotations

import json
import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from upstream_checkout import ask_upstream, needs_upstream

from domainbed_ext.datasets import find_datasets, get_dataset_class
from domainbed_ext.datasets.base import balanced_weights
from domainbed_ext.datasets.benchmarks import PACS
from domainbed_ext.datasets.folder import read_manifest, scan_folder
from domainbed_ext.errors import UsageError

HPARAMS = {"data_augmentation": False}


def save_image(path, value=128, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two domains, two classes; names chosen so that sorted order differs from creation order."""
    root = tmp_path / "pictures"
    for domain in ("sketch", "photo"):
        for value, class_name in ((30, "dog"), (20, "cat")):
            for number in (2, 10, 1):
                save_image(root / domain / class_name / f"{number}.png", value + number)
    return root


def test_scan_lists_in_domainbeds_order(folder):
    (folder / "photo" / "cat" / "notes.txt").write_text("no image")
    (folder / "photo" / "cat" / "._1.png").write_text("resource fork")
    (folder / ".cache").mkdir()
    save_image(folder / "photo" / "cat" / "deeper" / "3.JPG")
    index = scan_folder(folder)
    assert index.domains == ["photo", "sketch"]
    assert index.class_names == ["cat", "dog"]
    assert index.num_images == 13
    names = [
        os.path.relpath(path, folder / "photo" / "cat") for path in index.paths["photo"]["cat"]
    ]
    # As text, 10 comes before 2; a sub-folder after the files of its parent.
    assert names == ["1.png", "10.png", "2.png", "deeper/3.JPG"]


def test_scan_agrees_with_torchvisions_image_folder(folder):
    from torchvision.datasets import ImageFolder

    save_image(folder / "sketch" / "dog" / "a" / "5.jpeg")
    environments = scan_folder(folder).environments(["photo", "sketch"])
    for environment in environments:
        samples = ImageFolder(folder / environment.name).samples
        assert environment.paths == [path for path, _ in samples]
        assert environment.labels.tolist() == [label for _, label in samples]


def test_folder_data_set(folder):
    dataset_class = get_dataset_class(f"folder:{folder}")
    assert dataset_class.ENVIRONMENTS == ("photo", "sketch")
    assert (dataset_class.N_STEPS, dataset_class.CHECKPOINT_FREQ) == (5001, 300)
    dataset = dataset_class(None, [1], HPARAMS)
    assert dataset.input_shape == (3, 224, 224)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset[0].image(1).getpixel((0, 0)) == (30, 30, 30)  # photo/cat/10.png
    x, y = dataset[1][5]
    assert x.shape == (3, 224, 224)
    assert x.dtype == torch.float32
    assert y == 1


def test_backbone_decides_the_input_size(folder):
    hparams = {**HPARAMS, "backbone": "vit_small_patch32_64"}
    dataset = get_dataset_class(f"folder:{folder}")(None, [], hparams)
    assert dataset.input_shape == (3, 64, 64)
    assert dataset[0][0][0].shape == (3, 64, 64)


def test_home_is_expanded(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert get_dataset_class("folder:~/pictures").ENVIRONMENTS == ("photo", "sketch")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no data set folder at .*nowhere.*domain/class/image"):
        get_dataset_class(f"folder:{tmp_path}/nowhere")
    with pytest.raises(UsageError, match="names no place"):
        get_dataset_class("folder:")


def test_one_domain_is_refused(tmp_path):
    save_image(tmp_path / "photo" / "cat" / "1.png")
    with pytest.raises(UsageError, match=r"only the domain 'photo'.*two or more"):
        scan_folder(tmp_path)


def test_one_class_is_refused(tmp_path):
    for domain in ("art", "photo"):
        (tmp_path / domain / "cat").mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / domain / "cat" / "0.png")
    with pytest.raises(UsageError, match="holds only the class 'cat'; there is nothing to tell"):
        get_dataset_class(f"folder:{tmp_path}")


def test_empty_folder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no domain"):
        scan_folder(tmp_path)


def test_folder_without_images_is_refused(tmp_path):
    for domain in ("a", "b"):
        (tmp_path / domain / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"no images in .*\.png"):
        scan_folder(tmp_path)


def test_empty_class_is_refused(folder):
    for domain in ("photo", "sketch"):
        (folder / domain / "emu").mkdir()
    save_image(folder / "photo" / "emu" / "1.png")
    with pytest.raises(UsageError, match=r"class 'emu' of domain 'sketch'.*no images"):
        scan_folder(folder)


def test_differing_classes_are_named(folder):
    save_image(folder / "sketch" / "emu" / "1.png")
    (folder / "sketch" / "cat").rename(folder / "sketch" / "cats")
    with pytest.raises(UsageError, match="'sketch' lacks 'cat' and adds 'cats', 'emu'"):
        scan_folder(folder)


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "chunk"])
def test_corrupt_image_is_named_when_it_is_decoded(folder, damage):
    path = folder / "photo" / "cat" / "1.png"
    noise = np.random.RandomState(0).randint(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    if damage == "missing":
        dataset = get_dataset_class(f"folder:{folder}")(None, [], HPARAMS)
        path.unlink()
    else:
        broken = bytearray(content)
        broken[12:16] = b"XXXX"  # the name of the header chunk
        path.write_bytes(
            {"truncated": content[: len(content) // 2], "text": b"hello", "chunk": broken}[damage]
        )
        dataset = get_dataset_class(f"folder:{folder}")(None, [], HPARAMS)
    with pytest.raises(UsageError, match=r"photo/cat/1\.png \(environment photo\)"):
        dataset[0].image(0)
    assert dataset[0].image(1).size == (12, 10)


def manifest_rows(folder):
    return [
        {"domain": domain, "class": class_name, "path": f"pictures/{domain}/{class_name}/{n}.png"}
        for domain in ("sketch", "photo")
        for class_name in ("dog", "cat")
        for n in (10, 1, 2)
    ]


@pytest.mark.parametrize("form", ["csv", "json", "nested"])
def test_manifest_equals_the_folder_it_lists(folder, form):
    rows = manifest_rows(folder)
    file = folder.parent / ("list.csv" if form == "csv" else "list.json")
    if form == "csv":
        lines = ["path,extra,class,domain"]
        lines += [f"{row['path']},x,{row['class']},{row['domain']}" for row in rows]
        file.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")
    elif form == "json":
        file.write_text(json.dumps(rows))
    else:
        nested: dict[str, dict[str, list[str]]] = {}
        for row in rows:
            nested.setdefault(row["domain"], {}).setdefault(row["class"], []).append(row["path"])
        file.write_text(json.dumps(nested))
    assert read_manifest(file) == scan_folder(folder)
    dataset = get_dataset_class(f"manifest:{file}")(None, [0], HPARAMS)
    assert [environment.name for environment in dataset.datasets] == ["photo", "sketch"]
    assert (
        dataset.fingerprint()
        == get_dataset_class(f"folder:{folder}")(None, [0], HPARAMS).fingerprint()
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "domain,label,path\na,b,c\n", r"m\.csv lacks class .*domain, label, path"),
        ("m.csv", "domain,class,path\na,b\n", r"m\.csv, line 2: a value is missing"),
        ("m.csv", "", r"lacks domain, class, path"),
        ("m.json", "[", r"m\.json is not valid JSON"),
        ("m.json", '["a.png"]', r"expected a list of objects"),
        ("m.json", '{"a": 3}', r"expected a list of objects"),
        ("m.json", '[{"domain": "a", "class": "b"}]', r"lacks path in entry 0"),
    ],
)
def test_bad_manifest_is_explained(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_manifest(tmp_path / name)


def test_missing_manifest_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no manifest at .*list\.csv"):
        get_dataset_class(f"manifest:{tmp_path}/list.csv")


@pytest.fixture
def pacs(tmp_path):
    for domain in PACS.DOMAIN_FOLDERS:
        for class_name in ("dog", "elephant"):
            save_image(tmp_path / "PACS" / domain / class_name / "1.png")
    return tmp_path


def test_benchmark_reads_its_folder_and_warns_of_other_counts(pacs, caplog):
    with caplog.at_level(logging.WARNING):
        dataset = PACS(pacs, [0], HPARAMS)
    assert [environment.name for environment in dataset.datasets] == ["A", "C", "P", "S"]
    assert "art_painting" in dataset[0].paths[0]
    assert "8 images in 2 classes" in caplog.text
    assert "9,991 in 7" in caplog.text
    found = {d.name: d for d in find_datasets(pacs)}["PACS"]
    assert found.num_images == 8
    assert "9,991" in found.problem


@pytest.mark.upstream
@needs_upstream
def test_images_splits_and_weights_are_upstreams(tmp_path):
    """The same folder, read by DomainBed itself: paths, labels, keys of each split, weights."""
    for domain in PACS.DOMAIN_FOLDERS:
        for class_name, images in (("dog", 11), ("Elephant", 5), ("cat 2", 7)):
            for number in range(images):
                place = tmp_path / "PACS" / domain / class_name / ("deep" if number % 3 else "")
                save_image(place / f"{number}.{'png' if number % 2 else 'JPEG'}", size=(2, 2))
    code = """
from domainbed import datasets
from domainbed.lib import misc
hparams = {"data_augmentation": False}
answer = []
for env_i, env in enumerate(datasets.PACS(question, [1], hparams)):
    out, in_ = misc.split_dataset(env, int(len(env) * 0.2), misc.seed_hash(5, env_i))
    uda = []
    if env_i == 1:
        uda, in_ = misc.split_dataset(in_, int(len(in_) * 0.5), misc.seed_hash(5, env_i))
    answer.append([
        env.samples,
        [[env.samples.index(split.underlying_dataset.samples[key]) for key in split.keys]
         if split and hasattr(split.underlying_dataset, "samples")
         else [split.underlying_dataset.keys[key] for key in split.keys] if split else []
         for split in (in_, out, uda)],
        misc.make_weights_for_balanced_classes(out).tolist(),
    ])
print(json.dumps(answer))
"""
    answer = ask_upstream(code, str(tmp_path))
    dataset = PACS(tmp_path, [1], HPARAMS)
    for env, (samples, (in_keys, out_keys, uda_keys), out_weights) in enumerate(answer):
        environment = dataset[env]
        labels = environment.labels.tolist()
        assert [list(pair) for pair in zip(environment.paths, labels, strict=True)] == samples
        splits = dataset.splits(
            env, holdout_fraction=0.2, trial_seed=5, uda_holdout_fraction=0.5, test_envs=[1]
        )
        assert splits["in"].keys.tolist() == in_keys
        assert splits["out"].keys.tolist() == out_keys
        assert (splits["uda"].keys.tolist() if env == 1 else []) == uda_keys
        assert balanced_weights(splits["out"]).tolist() == pytest.approx(out_weights)


def test_missing_benchmark_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"PACS .*scripts\.download PACS.*--data_dir"):
        PACS(tmp_path, [0], HPARAMS)


def test_benchmark_with_a_stray_folder_is_refused(pacs):
    for class_name in ("dog", "elephant"):
        save_image(pacs / "PACS" / "backup" / class_name / "1.png")
    with pytest.raises(UsageError, match=r"5 domains \(art_painting, backup.*PACS has 4"):
        PACS(pacs, [0], HPARAMS)
