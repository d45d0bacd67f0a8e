"""The cache of decoded images: the same batches, built once, bounded, never stale."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import time

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_ext.datasets import get_dataset_class, image_cache, image_cache_build
from domainbed_ext.datasets.image_cache import read_cache, use_image_cache
from domainbed_ext.datasets.image_cache_build import reduced_size
from domainbed_ext.datasets.image_cache_flags import ImageCacheOptions
from domainbed_ext.errors import UsageError
from domainbed_ext.loaders import EvalBatches, TrainBatches
from domainbed_ext.records import read_records
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.train_checks import check_args
from domainbed_ext.training_job import train

HPARAMS = {"backbone": "vit_tiny_patch16_32"}
# Greyscale, palette, transparent and CMYK files all come out as RGB.
KINDS = [("L", "png"), ("P", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("RGB", "jpg")]


@pytest.fixture
def pictures(tmp_path):
    """Two domains of two classes, of unequal sizes and many kinds."""
    root = tmp_path / "pictures"
    random = np.random.RandomState(0)
    for domain in ("photo", "sketch"):
        for class_name in ("cat", "dog"):
            (root / domain / class_name).mkdir(parents=True)
            for number, (mode, ending) in enumerate(KINDS):
                shape = random.randint(33, 60, 2)
                image = Image.fromarray(random.randint(0, 256, (*shape, 3), np.uint8))
                image.convert(mode).save(root / domain / class_name / f"{number}.{ending}")
    return root


class Setting:
    """A data set with a cache, and what was said about it."""

    def __init__(self, pictures, tmp_path, mode="exact", gb=1.0, progress=None):
        self.lines = []
        self.folder = tmp_path / "cache"
        name = f"folder:{pictures}"
        self.dataset = get_dataset_class(name)(None, [1], HPARAMS)
        options = ImageCacheOptions(mode, self.folder, gb)
        use_image_cache(self.dataset, name, options, announce=self.lines.append, progress=progress)

    @property
    def decoded(self):
        return any("decoding" in line for line in self.lines)

    @property
    def caches(self):
        return sorted(path for path in self.folder.iterdir() if path.is_dir())


def plain(pictures):
    return get_dataset_class(f"folder:{pictures}")(None, [1], HPARAMS)


def batches(dataset, *, num_workers=0):
    """Some training batches and all evaluation batches of every environment."""
    found = []
    for env in range(len(dataset)):
        split = dataset.splits(env, holdout_fraction=0.2, trial_seed=0)["in"]
        train = iter(
            TrainBatches(
                split,
                batch_size=4,
                seed=3,
                transform=dataset.train_transform,
                num_workers=num_workers,
            )
        )
        found += [next(train) for _ in range(3)]
        found += EvalBatches(
            split, batch_size=3, transform=dataset.eval_transform, num_workers=num_workers
        )
    return found


def assert_same(left, right):
    assert len(left) == len(right)
    for (x, y), (other_x, other_y) in zip(left, right, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_exact_batches_are_those_of_decoding(pictures, tmp_path, num_workers):
    expected = batches(plain(pictures))
    cached = Setting(pictures, tmp_path).dataset
    for path in pictures.glob("*/*/*.*"):
        path.unlink()  # so that nothing can be decoded
    assert_same(batches(cached, num_workers=num_workers), expected)
    assert cached.image_side is None


def test_it_is_built_once_and_shows_how_far_it_is(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache_build, "CHUNK", 8)
    steps = []
    first = Setting(pictures, tmp_path, progress=lambda *step: steps.append(step))
    assert steps == [(8, 20), (16, 20), (20, 20)]
    assert first.decoded
    again = Setting(pictures, tmp_path, progress=lambda *step: steps.append(step))
    assert len(steps) == 3
    assert not again.decoded
    assert again.lines == [f"image cache: 20 decoded images in {again.caches[0]}"]
    assert [path.name[:15] for path in again.caches] == ["pictures-exact-"]
    # The same files at another place are the same images.
    moved = pictures.rename(tmp_path / "pictures2")
    (again.caches[0]).rename(again.folder / again.caches[0].name.replace("pictures", "pictures2"))
    assert not Setting(moved, tmp_path).decoded


def test_an_environment_with_a_cache_is_small_when_pickled(pictures, tmp_path):
    environment = Setting(pictures, tmp_path).dataset[0]
    environment.image(0)
    content = pickle.dumps(environment.cache)
    assert len(content) < 5000
    copy = pickle.loads(content)
    assert np.array_equal(np.asarray(copy.image(3)), np.asarray(environment.image(3)))


def test_pixels_are_a_copy_of_a_map_that_is_only_read(pictures, tmp_path):
    environment = Setting(pictures, tmp_path).dataset[0]
    pixels = environment.pixels(2)
    expected = np.asarray(plain(pictures)[0].image(2))
    assert np.array_equal(pixels, expected)
    pixels[:] = 0
    assert np.array_equal(environment.pixels(2), expected)
    assert environment.cache._pixels.mode == "r"


@pytest.mark.parametrize("change", ["touched", "content", "renamed", "removed", "added"])
def test_other_files_get_another_cache(pictures, tmp_path, change):
    Setting(pictures, tmp_path)
    path = pictures / "photo" / "cat" / "0.png"
    if change == "touched":
        os.utime(path, ns=(1, 1))
    elif change == "content":
        Image.new("RGB", (40, 40)).save(path)
    elif change == "renamed":
        path.rename(path.with_name("00.png"))
    elif change == "removed":
        path.unlink()
    else:
        shutil.copy(path, path.with_name("x.png"))
    again = Setting(pictures, tmp_path)
    assert again.decoded
    assert len(again.caches) == 2
    assert_same(batches(again.dataset), batches(plain(pictures)))


@pytest.mark.parametrize("file", ["images.bin", "index.json", "sizes.npy", "offsets.npy"])
@pytest.mark.parametrize("damage", ["truncated", "removed"])
def test_a_damaged_cache_is_built_again(pictures, tmp_path, file, damage):
    (cache,) = Setting(pictures, tmp_path).caches
    if damage == "removed":
        (cache / file).unlink()
    else:
        os.truncate(cache / file, (cache / file).stat().st_size // 2)
    again = Setting(pictures, tmp_path)
    assert again.decoded
    assert again.caches == [cache]
    assert_same(batches(again.dataset), batches(plain(pictures)))


def _build_slowly(pictures, tmp_path):
    image_cache_build.CHUNK = 2
    Setting(pictures, tmp_path, progress=lambda *_: time.sleep(0.5))


def test_what_a_killed_builder_left_is_cleared(pictures, tmp_path):
    builder = multiprocessing.get_context("fork").Process(
        target=_build_slowly, args=(pictures, tmp_path)
    )
    builder.start()
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("*.partial/images.bin")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    builder.kill()
    builder.join()
    (left,) = (tmp_path / "cache").glob("*.partial")
    again = Setting(pictures, tmp_path)
    assert again.decoded
    assert [path.name + ".partial" for path in again.caches] == [left.name]
    assert_same(batches(again.dataset), batches(plain(pictures)))


def test_an_interrupted_build_leaves_nothing(pictures, tmp_path):
    def interrupt(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Setting(pictures, tmp_path, progress=interrupt)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_unreadable_images_are_named_when_they_are_asked_for(pictures, tmp_path):
    path = pictures / "photo" / "cat" / "0.png"
    path.write_bytes(b"no image")
    setting = Setting(pictures, tmp_path)
    assert "1 that cannot be read (`ltdr data check`" in setting.lines[-1]
    environment = setting.dataset[0]
    with pytest.raises(UsageError, match=r"photo/cat/0\.png \(environment photo\)"):
        environment.image(0)
    assert environment.image(1).mode == "RGB"


def test_too_large_a_data_set_is_decoded_as_ever(pictures, tmp_path):
    setting = Setting(pictures, tmp_path, gb=1e-5)
    (line,) = setting.lines
    assert "not used" in line
    assert "--image_cache_gb" in line
    assert setting.caches == []
    assert_same(batches(setting.dataset), batches(plain(pictures)))
    # The caches of all data sets count together: 20 images of about 6 kB are there already.
    full = Setting(pictures, tmp_path)
    assert full.decoded
    limit = 1.2e-9 * (full.caches[0] / "images.bin").stat().st_size
    os.utime(pictures / "photo" / "cat" / "0.png", ns=(1, 1))
    assert "not used" in Setting(pictures, tmp_path, gb=limit).lines[0]


def test_a_wrong_guess_of_the_size_is_found_out_once(pictures, tmp_path, monkeypatch):
    """Here only the first image's header is read, and it is the smallest one."""
    Image.new("RGB", (8, 8)).save(pictures / "photo" / "cat" / "0.png")
    monkeypatch.setattr(image_cache_build, "NUM_SAMPLES", 1)
    first = Setting(pictures, tmp_path, gb=2e-5)
    assert first.decoded
    assert "not used" in first.lines[-1]
    assert first.caches == []
    second = Setting(pictures, tmp_path, gb=2e-5)
    assert not second.decoded
    assert "not used" in second.lines[-1]
    assert Setting(pictures, tmp_path, gb=1).decoded


def test_a_full_disk_only_costs_the_cache(pictures, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(image_cache_build, "_write_all", full)
    setting = Setting(pictures, tmp_path)
    assert "No space left on device" in setting.lines[-1]
    assert "--image_cache_dir" in setting.lines[-1]
    assert setting.caches == []
    assert_same(batches(setting.dataset), batches(plain(pictures)))


def test_a_folder_that_cannot_be_written_only_costs_the_cache(pictures, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    setting = Setting(pictures, tmp_path)
    assert "not used" in setting.lines[-1]
    assert setting.dataset[0].cache is None


def _build(pictures, tmp_path, results):
    try:
        setting = Setting(pictures, tmp_path)
        pixels = [setting.dataset[env].image(3).tobytes() for env in (0, 1)]
        results.put((setting.decoded, pixels))
    except BaseException as error:
        results.put((repr(error), None))
        raise


def test_two_jobs_at_once_build_it_once(pictures, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [context.Process(target=_build, args=(pictures, tmp_path, results)) for _ in range(4)]
    for job in jobs:
        job.start()
    found = [results.get(timeout=60) for _ in jobs]
    for job in jobs:
        job.join()
    assert sorted(decoded for decoded, _ in found) == [False, False, False, True]
    expected = [plain(pictures)[env].image(3).tobytes() for env in (0, 1)]
    assert all(pixels == expected for _, pixels in found)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((500, 375), 256, (341, 256)),
        ((375, 500), 256, (256, 341)),
        ((200, 300), 256, (200, 300)),
        ((256, 256), 256, (256, 256)),
        ((500, 375), None, (500, 375)),
        ((10_000, 300), 256, (8533, 256)),
    ],
)
def test_reduced_sizes(size, side, expected):
    assert reduced_size(size, side) == expected


def test_reduced_images_are_other_data(pictures, tmp_path):
    setting = Setting(pictures, tmp_path, mode="40")
    dataset, whole = setting.dataset, plain(pictures)
    assert dataset.image_side == 40
    assert dataset.fingerprint() == whole.fingerprint() + "-40px"
    for index in range(10):
        image, original = dataset[0].image(index), whole[0].image(index)
        assert image.size == reduced_size(original.size, 40)
        if image.size == original.size:
            assert image.tobytes() == original.tobytes()
    assert any(dataset[0].image(i).size != whole[0].image(i).size for i in range(10))
    exact = Setting(pictures, tmp_path)
    assert exact.decoded
    assert exact.dataset.fingerprint() == whole.fingerprint()


def test_reduced_images_that_do_not_fit_are_no_silent_other_run(pictures, tmp_path):
    with pytest.raises(UsageError, match=r"--image_cache 40: it needs about .* GB"):
        Setting(pictures, tmp_path, mode="40", gb=1e-6)
    with pytest.raises(UsageError, match="smaller than the model's input of 32 pixels"):
        Setting(pictures, tmp_path, mode="20")


@pytest.mark.parametrize("mode", ["on", "", "-5", "3", "²"])
def test_unknown_modes_are_refused(mode):
    with pytest.raises(UsageError, match="choose off, exact or the shorter side"):
        check_args(TrainArgs(image_cache=mode))
    with pytest.raises(UsageError, match="--image_cache_gb 0"):
        check_args(TrainArgs(image_cache_gb=0))


def test_data_in_memory_needs_none(tmp_path):
    dataset = get_dataset_class("RotatedDigits")(None, [0], {})
    lines = []
    options = ImageCacheOptions("exact", tmp_path / "cache")
    use_image_cache(dataset, "RotatedDigits", options, announce=lines.append)
    assert not lines
    assert not (tmp_path / "cache").exists()


def test_runs_use_it_and_say_so(pictures, tmp_path, capsys):
    """The same records with and without; reduced images are told apart."""
    records = {}
    for mode in ("off", "exact", "48"):
        args = TrainArgs(
            algorithm="ERM_ViT",
            dataset=f"folder:{pictures}",
            data_dir=str(tmp_path / "data"),
            output_dir=str(tmp_path / mode),
            hparams={
                "backbone": "vit_tiny_patch16_224",
                "pretrained": False,
                "batch_size": 2,
            },
            steps=1,
            device="cpu",
            num_workers=0,
            skip_model_save=True,
            image_cache=mode,
        )
        if mode == "48":
            with pytest.raises(UsageError, match="smaller than the model's input of 224"):
                train(args)
            continue
        train(args)
        (records[mode],) = read_records(tmp_path / mode / "results.jsonl")
        cache = tmp_path / "data" / "image_cache"
        assert cache.exists() == (mode == "exact")
    assert "image cache: 20 decoded images in" in capsys.readouterr().out
    timings = ("step_time", "args")
    same = [{k: v for k, v in r.items() if k not in timings} for r in records.values()]
    assert same[0] == same[1]
    assert "image_side" not in records["exact"]["provenance"]
    assert not any("cache" in name for name in records["exact"]["args"])


def test_provenance_names_the_side(pictures, tmp_path):
    from domainbed_ext.provenance import provenance

    dataset = Setting(pictures, tmp_path, mode="40").dataset
    found = provenance(dataset=dataset, algorithm=None, hparams={}, device="cpu")
    assert found["image_side"] == 40
    assert found["data_fingerprint"].endswith("-40px")
    (cache,) = (tmp_path / "cache").glob("pictures-40-*")
    assert read_cache(cache, 20) is not None


def test_a_hopeless_data_set_costs_no_look_at_each_file(pictures, tmp_path, monkeypatch):
    """DomainNet has 586,575 files, and each job would ask for their state in vain."""

    def look(paths):
        raise AssertionError("looked at each file")

    monkeypatch.setattr(image_cache, "_file_states", look)
    assert "not used" in Setting(pictures, tmp_path, gb=1e-5).lines[0]
