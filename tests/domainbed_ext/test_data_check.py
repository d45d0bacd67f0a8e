"""`ltdr data check`: counts, unreadable images, pictures in two domains."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from domainbed_ext.cli import main as ltdr
from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.benchmarks import PACS, Benchmark, DomainNet, TerraIncognita
from domainbed_ext.datasets.folder import ImageIndex
from domainbed_ext.datasets.near_duplicates import near_duplicates, thumbnail
from domainbed_ext.scripts.data_check import build_parser, check, main


def picture(seed, size=(80, 60)):
    """Soft blobs, different for every seed, like a photograph seen from afar."""
    noise = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def pictures(tmp_path):
    """Three domains of two classes with 4, 5 and 6 images each, all different."""
    root = tmp_path / "pictures"
    for number, domain in enumerate(("art", "photo", "sketch")):
        for label, class_name in enumerate(("cat", "dog")):
            (root / domain / class_name).mkdir(parents=True)
            for i in range(4 + number):
                picture(100 * number + 10 * label + i).save(root / domain / class_name / f"{i}.png")
    return root


def test_a_good_folder(pictures, capsys):
    assert ltdr(["data", "check", f"folder:{pictures}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["class", "art", "photo", "sketch", "all"] in lines
    assert ["cat", "4", "5", "6", "15"] in lines
    assert ["all", "8", "10", "12", "30"] in lines
    dataset = get_dataset_class(f"folder:{pictures}")(None, [], {})
    assert ["fingerprint:", dataset.fingerprint()] in lines
    assert lines[-1] == ["nothing", "is", "wrong"]


def test_unreadable_images_are_named(pictures, capsys):
    (pictures / "photo" / "dog" / "1.png").write_bytes(b"no image")
    path = pictures / "sketch" / "cat" / "2.png"
    path.write_bytes(path.read_bytes()[:200])
    assert main(["check", f"folder:{pictures}"]) == 1
    output = capsys.readouterr().out
    assert f"unreadable: {pictures}/photo/dog/1.png: cannot identify" in output
    assert f"unreadable: {path}: " in output
    assert "wrong: 2 images cannot be read" in output
    # Not opened, not noticed.
    assert main(["check", f"folder:{pictures}", "--counts_only"]) == 0


def test_what_is_clipped_or_left_out_is_a_warning(pictures, capsys):
    deep = np.full((60, 80), 40_000, np.uint16)
    Image.fromarray(deep).save(pictures / "art" / "cat" / "deep.png")
    for name in ("a.gif", "b.gif", "c", "Thumbs.db", ".hidden.gif"):
        (pictures / "photo" / "dog" / name).write_bytes(b"no matter")
    (pictures / "notes.txt").write_text("beside the domains")
    assert main(["check", f"folder:{pictures}"]) == 0
    output = capsys.readouterr().out
    assert "warning: 1 images have more than 8 bits a pixel" in output
    assert f"the first is {pictures}/art/cat/deep.png" in output
    left_out = "warning: 3 files are left out, whose endings are not read: .gif (2), no ending (1)"
    assert left_out in output


def test_a_manifest_that_lists_a_file_twice(pictures, tmp_path, capsys):
    rows = ["domain,class,path"]
    for path in sorted(pictures.glob("*/*/*.png")):
        rows.append(f"{path.parts[-3]},{path.parts[-2]},{path}")
    once = tmp_path / "once.csv"
    once.write_text("\n".join(rows))
    assert main(["check", f"manifest:{once}", "--counts_only"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    (tmp_path / "list.csv").write_text("\n".join([*rows, rows[1]]))
    assert main(["check", f"manifest:{tmp_path / 'list.csv'}", "--counts_only"]) == 0
    output = capsys.readouterr().out
    assert "warning: 1 files are listed twice or more in art" in output
    assert str(pictures / "art" / "cat" / "0.png") in output


def test_a_manifest_with_a_missing_file(pictures, tmp_path, capsys):
    rows = ["domain,class,path"]
    rows += [f"{p.parent.parent.name},{p.parent.name},{p}" for p in sorted(pictures.glob("*/*/*"))]
    file = tmp_path / "list.csv"
    file.write_text("\n".join([*rows, "art,cat,gone.png"]))
    assert main(["check", f"manifest:{file}"]) == 1
    assert "gone.png: it does not exist" in capsys.readouterr().out


def test_the_same_picture_in_two_domains(pictures, capsys):
    original = picture(0, (320, 240))
    original.resize((111, 90)).save(pictures / "photo" / "cat" / "copy.jpg", quality=60)
    brighter = original.point(lambda value: 30 + 0.8 * value)
    brighter.save(pictures / "sketch" / "dog" / "copy.png")
    # In its own domain it is nobody's business here.
    original.save(pictures / "art" / "dog" / "copy.png")
    found = check(f"folder:{pictures}", "data")
    names = {
        tuple(found.paths[i][len(str(pictures)) + 1 :] for i in (pair.first, pair.second))
        for pair in found.pairs
    }
    art = ("art/cat/0.png", "art/dog/copy.png")
    assert names == {
        *((path, "photo/cat/copy.jpg") for path in art),
        *((path, "sketch/dog/copy.png") for path in art),
        ("photo/cat/copy.jpg", "sketch/dog/copy.png"),
    }
    assert main(["check", f"folder:{pictures}"]) == 0
    output = capsys.readouterr().out
    assert "alike (art, photo; correlation 0.99" in output or "correlation 1.000" in output
    assert "warning: 5 pairs of alike images in different domains" in output


def test_drawings_on_white_are_told_apart():
    """Thin strokes: nearly all pixels of two such drawings are equal."""
    random = np.random.RandomState(0)
    drawings = []
    for _ in range(300):
        pixels = np.full((64, 64), 255, np.uint8)
        for _ in range(4):
            row, column, length = random.randint(4, 40, 3)
            if random.rand() < 0.5:
                pixels[row : row + 2, column : column + length] = 0
            else:
                pixels[row : row + length, column : column + 2] = 0
        drawings.append(Image.fromarray(pixels))
    copy = drawings[7].filter(ImageFilter.GaussianBlur(0.5))
    small = np.stack([thumbnail(image) for image in [*drawings, copy]])
    pairs = near_duplicates(small, np.arange(301) % 2)
    assert [(pair.first, pair.second) for pair in pairs] in ([], [(7, 300)])
    pairs = near_duplicates(small, [0] * 300 + [1])
    assert [(pair.first, pair.second) for pair in pairs] == [(7, 300)]


def test_empty_pages_are_no_duplicates():
    white = np.full((10, 16, 16), 255, np.uint8)
    assert near_duplicates(white, np.arange(10)) == []
    assert near_duplicates(white[:0], []) == []


def test_classes_beyond_a_hundred_are_abridged(tmp_path, capsys):
    for domain in ("a", "b"):
        for number in range(101):
            folder = tmp_path / "many" / domain / f"class{number}"
            folder.mkdir(parents=True)
            for i in range(1 + (number > 50)):
                (folder / f"{i}.png").write_bytes(b"")
    name = f"folder:{tmp_path}/many"
    assert main(["check", name, "--counts_only"]) == 0
    output = capsys.readouterr().out
    assert "The 20 smallest of 101 classes" in output
    assert "class99 " not in output
    assert main(["check", name, "--counts_only", "--all_classes"]) == 0
    assert "class99 " in capsys.readouterr().out


def test_data_in_memory_is_counted(capsys):
    assert main(["check", "RotatedDigits"]) == 0
    assert "1,797" in capsys.readouterr().out


def test_bad_input_is_one_line(tmp_path, capsys):
    for argument in ("PACS", "MNIST", f"folder:{tmp_path}/nowhere"):
        assert main(["check", argument, "--data_dir", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_flags_are_frozen():
    names = {action.dest for action in build_parser()._actions}
    assert names == {"help", "command", "dataset", "data_dir", "counts_only", "all_classes"}
    assert "ltdr data check folder:" in build_parser().format_help()


def index_of(dataset_class: type[Benchmark], counts) -> ImageIndex:
    """As many images per domain, the first class holding what the others leave."""
    num = dataset_class.NUM_CLASSES
    return ImageIndex(
        {
            domain: {
                f"class{label:03}": ["x"] * (1 if label else count - num + 1)
                for label in range(num)
            }
            for domain, count in zip(dataset_class.DOMAIN_FOLDERS, counts, strict=True)
        }
    )


@pytest.mark.parametrize("name", ["PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet"])
def test_published_counts_add_up(name):
    dataset_class = get_dataset_class(name)
    assert sum(dataset_class.DOMAIN_COUNTS) == dataset_class.NUM_IMAGES
    assert len(dataset_class.DOMAIN_COUNTS) == len(dataset_class.ENVIRONMENTS)
    index = index_of(dataset_class, dataset_class.DOMAIN_COUNTS)
    assert dataset_class.count_problem(index) is None
    assert dataset_class.is_known_copy(index)


def test_the_copy_of_terra_incognita_that_is_around():
    (counts,) = TerraIncognita.OTHER_COUNTS
    assert sum(counts) == 24_330
    index = index_of(TerraIncognita, counts)
    problem = TerraIncognita.count_problem(index)
    assert "24,330 images in 10 classes, the published tables 24,788 in 10" in problem
    assert "location_38 9,736 instead of 9,767" in problem
    assert "another complete copy" in problem
    assert TerraIncognita.is_known_copy(index)


def test_an_incomplete_benchmark_is_wrong(tmp_path, capsys):
    for number, domain in enumerate(PACS.DOMAIN_FOLDERS):
        for label in range(7):
            folder = tmp_path / "PACS" / domain / f"class{label}"
            folder.mkdir(parents=True)
            picture(10 * number + label).save(folder / "1.png")
    assert main(["check", "PACS", "--data_dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "wrong: this copy of PACS has 28 images in 7 classes" in captured.out
    assert "sketch 7 instead of 3,929" in captured.out
    assert captured.err == ""
    index = index_of(DomainNet, [count - 1 for count in DomainNet.DOMAIN_COUNTS])
    assert not DomainNet.is_known_copy(index)
