from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from sweep_records import hand_made_records, make_record, write_sweep

from domainbed_ext.errors import UsageError
from domainbed_ext.records import (
    JobCount,
    append_record,
    count_jobs,
    group_records,
    load_jobs,
    load_records,
    read_records,
    write_records,
)


def _record(step):
    return make_record([0], step=step, in_acc=[0.5, 0.5], out_acc=[0.5, 0.5])


def test_records_are_sorted_json_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, _record(0) | {"loss": np.float32(0.5), "count": np.int64(3)})
    append_record(path, _record(1))
    lines = path.read_text().splitlines()
    assert lines[1] == json.dumps(_record(1), sort_keys=True)
    assert (json.loads(lines[0])["loss"], json.loads(lines[0])["count"]) == (0.5, 3)
    assert [record["step"] for record in read_records(path)] == [0, 1]


def test_values_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(TypeError, match="object"):
        append_record(tmp_path / "results.jsonl", {"loss": object()})
    assert not (tmp_path / "results.jsonl").exists()


def test_appending_after_a_killed_write_drops_the_partial_line(tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, _record(0))
    with open(path, "a") as file:
        file.write('{"args": {"algo')
    append_record(path, _record(1))
    assert [record["step"] for record in read_records(path)] == [0, 1]


def test_appending_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_record(0)))
    append_record(path, _record(1))
    assert [record["step"] for record in read_records(path)] == [0, 1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"step": "7"}, 'step cannot be "7"'),
        ({"env0_in_acc": "0.5"}, 'env0_in_acc cannot be "0.5"'),
        ({"env1_out_acc": None}, "env1_out_acc cannot be null"),
        ({"hparams": [1]}, r"hparams cannot be \[1\]"),
        ({"provenance": "x"}, 'provenance cannot be "x"'),
        ({"args": {"test_envs": 0}}, r"args\.test_envs cannot be 0"),
        ({"args": {"test_envs": ["0"]}}, r"args\.test_envs cannot be \[\"0\"\]"),
        ({"args": {"trial_seed": None}}, r"args\.trial_seed cannot be null"),
        ({"args": {"dataset": {}}}, r"args\.dataset cannot be \{\}"),
    ],
)
def test_a_record_whose_values_were_changed_is_named(tmp_path, change, named):
    record = _record(0)
    args = record["args"] | change.get("args", {})
    path = tmp_path / "results.jsonl"
    write_records(path, [_record(0), record | change | {"args": args}])
    with pytest.raises(UsageError, match=rf"results\.jsonl, line 2: {named}"):
        read_records(path)


@pytest.mark.parametrize(
    "line", [b"\x00" * 100, b"\xff\xfe", b"[" * 100_000, b"nan", b'{"args": ', b"17"]
)
def test_a_line_of_garbage_is_named_wherever_it_is(tmp_path, line):
    good = json.dumps(_record(0)).encode()
    for lines in ([line, good], [good, line, good], [good, line]):
        path = tmp_path / "results.jsonl"
        path.write_bytes(b"\n".join([*lines, b""]))
        number = lines.index(line) + 1
        with pytest.raises(UsageError, match=rf"results\.jsonl, line {number} is ") as caught:
            read_records(path)
        assert "\n" not in str(caught.value)


def test_a_finished_job_has_no_line_that_is_cut_off(tmp_path):
    path = tmp_path / "job" / "results.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(_record(0)) + "\n" + json.dumps(_record(1))[:-20])
    assert len(load_records(tmp_path)) == 1
    (path.parent / "done").write_text("done")
    with pytest.raises(UsageError, match=r"results\.jsonl, line 2 is not a JSON record"):
        load_records(tmp_path)


def test_a_cut_off_last_line_is_left_out_with_a_warning(tmp_path, caplog):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_record(0)) + "\n" + json.dumps(_record(1))[:50])
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in read_records(path)] == [0]
    assert f"{path}, line 2" in caplog.text


@pytest.mark.parametrize(
    ("bad_line", "complaint"),
    [
        ("{broken", "line 2 is not a JSON record"),
        ("[1, 2]", "no object 'args'"),
        ('{"args": {"algorithm": "ERM"}}', r"lacks args\.dataset.*step"),
    ],
)
def test_a_corrupt_line_is_named(tmp_path, bad_line, complaint):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(_record(0)) + "\n" + bad_line + "\n" + json.dumps(_record(1)) + "\n")
    with pytest.raises(UsageError, match=complaint) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text_are_named(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UsageError, match="line 1"):
        read_records(path)


def test_write_records_replaces_the_file_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    for step in range(3):
        append_record(path, _record(step))
    write_records(path, read_records(path)[:1])
    assert [record["step"] for record in read_records(path)] == [0]
    assert [child.name for child in tmp_path.iterdir()] == ["results.jsonl"]


def test_load_records_reads_every_job_and_a_single_one(tmp_path):
    records = hand_made_records()
    write_sweep(tmp_path, records, unfinished=["0" * 32])
    (tmp_path / "results.txt").write_text("an old table")
    loaded = load_records(tmp_path)
    assert sorted(map(json.dumps, loaded)) == sorted(json.dumps(r, sort_keys=True) for r in records)
    job = tmp_path / records[0]["args"]["output_dir"].split("/")[1]
    assert [record["step"] for record in load_records(job)] == [0, 10]


def test_jobs_without_done_are_unfinished(tmp_path):
    write_sweep(tmp_path, hand_made_records(), unfinished=["0" * 32])
    write_sweep(tmp_path, [], unfinished=["diverged"])
    (tmp_path / "diverged" / "failed").write_text("{}")
    (tmp_path / "plots").mkdir()
    jobs = count_jobs(tmp_path)
    assert jobs == JobCount(12, ["0" * 32, "diverged"], ["diverged"])


def test_finished_jobs_without_a_record_are_counted(tmp_path):
    write_sweep(tmp_path, [], unfinished=["0" * 32, "1" * 32, "2" * 32])
    (tmp_path / ("0" * 32) / "done").write_text("done")
    (tmp_path / ("1" * 32) / "done").write_text("done")
    (tmp_path / ("1" * 32) / "results.jsonl").write_text("")
    assert count_jobs(tmp_path) == JobCount(3, ["2" * 32], [], ["0" * 32, "1" * 32])
    assert list(load_jobs(tmp_path).values()) == [[]]


@pytest.mark.parametrize("reader", [load_records, count_jobs])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch, reader):
    write_sweep(tmp_path, hand_made_records()[:1], unfinished=["0" * 32])
    real = Path.is_file

    def is_file(path):  # what the system says of a job of another user
        if path.parent.name == "0" * 32:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "is_file", is_file)
    with pytest.raises(UsageError, match=f"cannot read .*{'0' * 32}/.*: Permission denied; make"):
        reader(tmp_path)


def test_records_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    write_sweep(tmp_path, hand_made_records()[:1])

    def read_bytes(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(UsageError, match=r"cannot read .*results\.jsonl: Input/output error; make"):
        load_records(tmp_path)


@pytest.mark.parametrize("reader", [load_records, count_jobs])
def test_folders_that_are_not_there_are_refused(tmp_path, reader):
    with pytest.raises(UsageError, match="does not exist"):
        reader(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        reader(tmp_path / "file")


def test_a_run_with_two_test_domains_belongs_to_two_groups():
    records = [
        make_record([1, 0], in_acc=[0, 0, 0], out_acc=[0, 0, 0]),
        make_record([0], in_acc=[0, 0, 0], out_acc=[0, 0, 0]),
        make_record([], in_acc=[0, 0, 0], out_acc=[0, 0, 0]),
    ]
    groups = group_records(records)
    assert [(group.test_env, len(group.records)) for group in groups] == [(1, 1), (0, 2)]
    assert (groups[0].trial_seed, groups[0].dataset, groups[0].algorithm) == (0, "Debug28", "ERM")
