"""Downloads on loopback: cut, resumed, changed, wrong."""

from __future__ import annotations

import hashlib

import pytest
from loopback_server import serve

from domainbed_ext.datasets import resumable_http
from domainbed_ext.datasets.resumable_http import DownloadError, fetch

CONTENT = bytes(range(256)) * 40
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def site(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(resumable_http, "WAIT_SECONDS", 0.0)
    with serve() as running:
        running.files["/file"] = CONTENT
        yield running


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_fetched_once(site, tmp_path):
    seen = []
    for _ in range(2):
        fetch(
            site.base + "/file",
            tmp_path / "file",
            md5=MD5,
            num_bytes=len(CONTENT),
            progress=lambda *at: seen.append(at),
        )
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert names(tmp_path) == ["file"]
    assert site.requests == [("/file", None)]
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_cut_connection_goes_on_where_it_was_cut(site, tmp_path):
    site.cuts["/file"] = [1000, 2000]
    fetch(site.base + "/file", tmp_path / "file", md5=MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [asked for _, asked in site.requests] == [None, "bytes=1000-", "bytes=3000-"]


def test_another_run_goes_on_too(site, tmp_path):
    site.cuts["/file"] = [1000] + [0] * resumable_http.ATTEMPTS
    with pytest.raises(DownloadError, match="cut at byte 1,000 of 10,240"):
        fetch(site.base + "/file", tmp_path / "file", md5=MD5)
    assert names(tmp_path) == ["file.part", "file.part.tag"]
    site.requests.clear()
    fetch(site.base + "/file", tmp_path / "file", md5=MD5)
    assert site.requests == [("/file", "bytes=1000-")]
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("way", ["changed", "no ranges", "no tag"])
def test_pieces_of_different_files_are_never_joined(site, tmp_path, way):
    site.cuts["/file"] = [1000] + [0] * resumable_http.ATTEMPTS
    if way == "no tag":
        site.tag = ""
    with pytest.raises(DownloadError):
        fetch(site.base + "/file", tmp_path / "file")
    new = CONTENT[::-1]
    site.files["/file"] = new
    if way == "changed":
        site.tag = '"two"'
    elif way == "no ranges":
        site.ranges = False
    fetch(site.base + "/file", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == new


def test_a_part_beyond_the_end_is_dropped(site, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.part.tag").write_text(site.tag)
    fetch(site.base + "/file", tmp_path / "file", md5=MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(site, tmp_path):
    for wrong in ({"md5": "0" * 32}, {"sha256": "0" * 64}):
        with pytest.raises(DownloadError, match=f"with the {next(iter(wrong))} .* instead of 000"):
            fetch(site.base + "/file", tmp_path / "file", **wrong)
        assert names(tmp_path) == []
    with pytest.raises(DownloadError, match="10,240 bytes instead of 10,241"):
        fetch(site.base + "/file", tmp_path / "file", num_bytes=10_241)
    assert names(tmp_path) == []


def test_what_is_no_file_is_said(site, tmp_path):
    with pytest.raises(DownloadError, match=r"/gone answers 404"):
        fetch(site.base + "/gone", tmp_path / "gone")
    site.html.add("/quota")
    with pytest.raises(DownloadError, match="gives a web page"):
        fetch(site.base + "/quota", tmp_path / "quota")
    assert len(site.requests) == 2  # no use asking again


def test_nobody_there(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(resumable_http, "WAIT_SECONDS", 0.0)
    with pytest.raises(DownloadError, match=r"127\.0\.0\.1:9/x: .*refused"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x")


def test_trouble_at_home_is_no_download_error(site, tmp_path):
    with pytest.raises(FileNotFoundError):
        fetch(site.base + "/file", tmp_path / "nowhere" / "file")
