"""What a sweep says of job folders that its flags do not name."""

from __future__ import annotations

import json
import shlex
import shutil

import pytest

from domainbed_ext.job_files import mark_done, mark_failed
from domainbed_ext.other_jobs import flags_of
from domainbed_ext.plan import make_jobs
from domainbed_ext.scripts.sweep import main
from domainbed_ext.sweep_flags import build_parser


def run(folder, *flags):
    """The jobs of such flags, each with one record, the first failed and the others done."""
    jobs = make_jobs(build_parser().parse_args([*flags, "--output_dir", str(folder)]))
    for number, job in enumerate(jobs):
        job.output_dir.mkdir(parents=True, exist_ok=True)
        record = {"args": job.args.record_args(), "step": 0, "hparams": {}}
        (job.output_dir / "results.jsonl").write_text(json.dumps(record) + "\n")
        if number:
            mark_done(job.output_dir)
        else:
            mark_failed(job.output_dir, reason="error", message="broken")
    return jobs


LAUNCHED = {
    "plain": "--algorithms LTDR ERM --datasets PACS Debug28 --n_hparams 1 --n_trials 1",
    "more": "--algorithms LTDR --datasets Debug28 --n_hparams_from 1 --n_hparams 3 --n_trials 2 "
    "--single_test_envs --steps 11 --hparams '{\"batch_size\": 8}' --data_dir 'my data' "
    "--holdout_fraction 0.3 --hparams_per_trial shared",
}


@pytest.mark.parametrize("case", LAUNCHED)
def test_the_hint_finds_the_jobs(tmp_path, capsys, case):
    jobs = run(tmp_path, *shlex.split(LAUNCHED[case]))
    assert main(["status", "--datasets", "RotatedDigits", "--output_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    counts = f"{len(jobs)} job folders in {tmp_path} belong to other flags "
    assert counts + f"({len(jobs) - 1} done, 1 failed)" in said
    command = said.rpartition("For instance:\n  ltdr sweep ")[2].strip()
    again = make_jobs(build_parser().parse_args(shlex.split(command)))
    assert {job.output_dir for job in again} == {job.output_dir for job in jobs}
    assert main(shlex.split(command)) == 0
    assert "other flags" not in capsys.readouterr().out


def test_beside_jobs_of_these_flags_they_are_counted(tmp_path, capsys):
    flags = "--datasets Debug28 --algorithms LTDR --n_hparams 1 --n_trials 1".split()
    run(tmp_path, *flags)
    others = run(tmp_path, *flags, "--steps", "7")
    (tmp_path / "slurm").mkdir()  # no job's
    place = ["--output_dir", str(tmp_path)]
    assert main(["status", *flags, *place]) == 0
    said = capsys.readouterr().out
    assert f"{len(others)} job folders in {tmp_path} belong to other flags" in said
    assert "For instance" not in said


def test_without_a_record_there_is_no_hint(tmp_path):
    assert flags_of([tmp_path]) is None
    (tmp_path / "results.jsonl").write_text("{}\n")
    assert flags_of([tmp_path]) is None


def test_looking_after_jobs_needs_no_data(tmp_path, capsys):
    flags = ["--datasets", "PACS", "--algorithms", "LTDR", "--data_dir", str(tmp_path / "no")]
    flags += ["--n_hparams", "1", "--n_trials", "1", "--output_dir", str(tmp_path / "sweep")]
    jobs = run(tmp_path / "sweep", *flags)
    assert main(["status", *flags]) == 0
    captured = capsys.readouterr()
    assert "PACS" in captured.out
    assert captured.err.startswith("warning: PACS not found in the data folder")
    assert main(["delete_incomplete", "--skip_confirmation", *flags]) == 0
    assert not jobs[0].output_dir.exists()
    assert main(["launch", "--dry-run", *flags]) == 2
    assert "error: PACS not found" in capsys.readouterr().err


def test_nor_does_a_folder_of_images_that_was_trained_on_elsewhere(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for domain in ("day", "dusk", "night"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / domain / name).mkdir(parents=True)
            (tmp_path / "images" / domain / name / "1.png").touch()
    flags = "--datasets folder:images --algorithms LTDR GMOE --n_hparams 1 --n_trials 1".split()
    jobs = run(tmp_path / "sweep", *flags)
    assert len(jobs) == 12
    shutil.rmtree(tmp_path / "images")
    place = ["--output_dir", str(tmp_path / "sweep")]
    assert main(["status", *flags, *place]) == 2  # the records do not say how many domains
    assert "no data set folder at images" in capsys.readouterr().err
    for job in jobs:
        file = job.output_dir / "results.jsonl"
        provenance = {"environments": ["day", "dusk", "night"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"provenance": provenance}))
    assert main(["status", *flags, *place]) == 0
    captured = capsys.readouterr()
    assert "folder:images" in captured.out
    assert "other flags" not in captured.out
    assert captured.err.startswith("warning: no data set folder at images")
    assert captured.err.count("warning") == 1  # though two algorithms lack it
    assert main(["launch", *flags, *place]) == 2
