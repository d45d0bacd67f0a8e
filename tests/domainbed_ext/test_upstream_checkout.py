"""The contract with a real DomainBed checkout: runs wherever DOMAINBED_DIR names one.

The checkout is copied, the hook is active as after an install, and DomainBed's own programs run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from upstream_checkout import checkout, needs_upstream

from domainbed_ext import doctor
from domainbed_ext.hparams import VIT_ALGORITHMS, random_hparams
from domainbed_ext.records import load_records
from domainbed_ext.seeds import seed_hash
from domainbed_ext.upstream_additions import lacking_names

pytestmark = [pytest.mark.upstream, needs_upstream]

ROOT = Path(__file__).resolve().parents[2]
DEBUG_RUN = ("--dataset", "Debug28", "--steps", "3", "--hparams", '{"batch_size": 8}')


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the checkout that may be written to."""
    target = tmp_path_factory.mktemp("upstream") / "DomainBed"
    skip = shutil.ignore_patterns("__pycache__")
    return Path(shutil.copytree(checkout(), target, ignore=skip, symlinks=True))


@pytest.fixture(scope="module")
def python(clone, tmp_path_factory):
    """Runs Python in the copy, with the hook, which `DOMAINBED_EXT="off"` switches off."""
    start = tmp_path_factory.mktemp("start")
    # sitecustomize stands in for the .pth line; test_packaging.py tests the line itself.
    (start / "sitecustomize.py").write_text("import domainbed_ext._startup\n")

    def run(*args, cwd=clone, status=0, path=(), **variables):
        env = {k: v for k, v in os.environ.items() if k != "DOMAINBED_EXT"}
        env["PYTHONPATH"] = os.pathsep.join(str(p) for p in (*path, start, ROOT))
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        env.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **variables)
        command = [sys.executable, *args]
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env)
        if done.returncode and "ModuleNotFoundError" in done.stderr:
            pytest.skip(f"the checkout does not run here: {done.stderr.splitlines()[-1]}")
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    run("-c", "import domainbed.algorithms, domainbed.datasets")
    return run


@pytest.fixture(scope="module")
def sweep(python, tmp_path_factory):
    """A finished sweep of DomainBed's, through our launcher."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    flags = ["--algorithms", "LTDR", "ERM", "--datasets", "Debug28", "--single_test_envs"]
    flags += ["--n_hparams", "1", "--n_trials", "1", "--command_launcher", "ltdr_local"]
    flags += [*DEBUG_RUN[2:], "--data_dir", "/none", "--output_dir", str(folder)]
    python("-m", "domainbed.scripts.sweep", "launch", "--skip_confirmation", *flags)
    return folder


def records_of(folder):
    lines = (folder / "results.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        record.pop("step_time")
        record["args"].pop("output_dir")
    return records


def test_this_version_is_known():
    assert lacking_names(checkout() / "domainbed") == []


def test_its_sweep_trains_ours_beside_its_own(sweep, python):
    jobs = [folder for folder in sweep.iterdir() if folder.is_dir()]
    assert len(jobs) == 6
    assert all((job / "done").exists() for job in jobs)
    assert not [job for job in jobs if "gmoe-ltdr" in (job / "err.txt").read_text()]
    table = python("-m", "domainbed.scripts.collect_results", "--input_dir", str(sweep)).stdout
    rows = [line.split()[0] for line in table.splitlines()[3:6] if line.strip()]
    assert rows == ["Algorithm", "ERM", "LTDR"]
    flags = ["--input_dir", str(sweep), "--dataset", "Debug28", "--algorithm", "LTDR"]
    best = python("-m", "domainbed.scripts.list_top_hparams", *flags, "--test_env", "0").stdout
    assert "backbone: vit_dim64_patch4_28" in best


def test_both_tabulate_the_records_alike(sweep, python):
    flags = ["--input_dir", str(sweep)]
    theirs = python("-m", "domainbed.scripts.collect_results", *flags).stdout
    module = "domainbed_ext.scripts.collect_results"
    ours = python("-m", module, *flags, "--format", "domainbed").stdout
    assert ours == theirs


def test_its_sweep_goes_on_where_ours_would(sweep, python):
    # the same jobs have the same folders, so ours finds nothing left to do
    flags = ["--algorithms", "LTDR", "ERM", "--datasets", "Debug28", "--single_test_envs"]
    flags += ["--n_hparams", "1", "--n_trials", "1", "--command_launcher", "dummy"]
    flags += [*DEBUG_RUN[2:], "--data_dir", "/none", "--output_dir", str(sweep)]
    module = "domainbed_ext.scripts.sweep"
    done = python("-m", module, "launch", "--skip_confirmation", *flags)
    assert "Dummy launcher" not in done.stdout
    assert len(load_records(sweep)) == 12


def test_its_jobs_are_held_while_they_run(python, sweep, tmp_path):
    assert not list(sweep.glob("*/lock"))
    code = """
import subprocess, sys, time
from pathlib import Path
from domainbed_ext.jobs import job_state
command = [sys.executable, "-m", "domainbed.scripts.train", *sys.argv[2:]]
with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
    results = Path(sys.argv[1], "results.jsonl")
    while not results.exists() and process.poll() is None:
        time.sleep(0.2)
    print(job_state(results.parent).value)
    process.kill()
print(job_state(results.parent).value)
"""
    flags = ["--algorithm", "ERM", *DEBUG_RUN, "--steps", "9999", "--output_dir", str(tmp_path)]
    said = python("-c", code, str(tmp_path), *flags).stdout
    assert said.split() == ["Running", "Incomplete"]


def test_its_own_algorithms_do_not_notice(python, tmp_path):
    flags = ["--algorithm", "ERM", *DEBUG_RUN, "--hparams_seed", "3", "--trial_seed", "1"]
    for name in ("on", "off"):
        flags_out = ["--output_dir", str(tmp_path / name)]
        python("-m", "domainbed.scripts.train", *flags, *flags_out, DOMAINBED_EXT=name)
    on, off = (records_of(tmp_path / name) for name in ("on", "off"))
    assert len(on) == 2
    assert on == off


def test_its_hparams_and_default_sweep_are_its_own(python, clone, tmp_path):
    code = """
import json, sys
from domainbed import algorithms, datasets, hparams_registry
ours = json.loads(sys.argv[1])
names = [name for name in algorithms.ALGORITHMS if name not in ours]
sets = [name for name in datasets.DATASETS if name not in ours]
def draw(a, d, s):
    registry = hparams_registry
    return registry.random_hparams(a, d, s) if s else registry.default_hparams(a, d)
print(json.dumps([names, sets, {
    f"{a} {d} {s}": repr(draw(a, d, s)) for a in names for d in sets for s in range(6)
}]))
"""
    ours = json.dumps([*VIT_ALGORITHMS, "RotatedDigits", "ColoredDigits"])
    on, off = (python("-c", code, ours, DOMAINBED_EXT=state).stdout for state in ("on", "off"))
    assert on == off
    flags = ["--data_dir", "/none", "--output_dir", str(tmp_path), "--command_launcher", "dummy"]
    flags += ["--n_hparams", "1", "--n_trials", "1", "--skip_confirmation"]
    on, off = (
        python("-m", "domainbed.scripts.sweep", "delete_incomplete", *flags, DOMAINBED_EXT=s).stdout
        for s in ("on", "off")
    )
    assert on == off
    assert "RotatedDigits" not in on


def test_digits_train_with_its_algorithms_and_ours(python, tmp_path):
    flags = ["--dataset", "RotatedDigits", "--steps", "2", "--skip_model_save"]
    for algorithm in ("CORAL", "GMOE"):
        folder = tmp_path / algorithm
        flags_out = ["--algorithm", algorithm, "--output_dir", str(folder), "--hparams_seed", "1"]
        python("-m", "domainbed.scripts.train", *flags, *flags_out)
        assert len(records_of(folder)) == 2
    theirs, ours = (records_of(tmp_path / name)[0]["hparams"] for name in ("CORAL", "GMOE"))
    seed = seed_hash(1, 0)
    assert ours == {**random_hparams("GMOE", "RotatedDigits", seed), "schedule_steps": 2}
    # CORAL's are ERM's and one more
    theirs.pop("mmd_gamma")
    assert theirs == random_hparams("ERM", "RotatedDigits", seed)


def test_what_looks_at_the_images_first_stops_at_the_first_step(python, tmp_path):
    flags = ["--algorithm", "CLUSTER", "--output_dir", str(tmp_path), "--data_dir", "/none"]
    python("-m", "domainbed.scripts.train", *DEBUG_RUN, *flags, status=1)
    last = (tmp_path / "err.txt").read_text().splitlines()[-1]
    assert "CLUSTER looks at all training images before its first step" in last
    assert "use python -m domainbed_ext.scripts.train" in last
    assert not (tmp_path / "results.jsonl").exists()


def test_from_another_project_by_its_path(python, clone, tmp_path):
    code = "import domainbed.algorithms as a; print(a.get_algorithm_class('LTDR').__name__)"
    assert python("-c", code, cwd=tmp_path, path=[clone]).stdout == "LTDR\n"


def test_emojidg_is_refused_before_any_job_starts(python, tmp_path):
    flags = ["--data_dir", "/none", "--output_dir", str(tmp_path), "--command_launcher", "dummy"]
    flags += ["--algorithms", "LTDR", "--datasets", "EmojiDG", "--skip_confirmation"]
    done = python("-m", "domainbed.scripts.sweep", "launch", *flags, status=1)
    assert "EmojiDG is split by code point" in done.stderr.splitlines()[-1]


def test_a_failed_job_fails_the_sweep(python, tmp_path):
    flags = ["--data_dir", "/none", "--output_dir", str(tmp_path), "--single_test_envs"]
    flags += ["--algorithms", "LTDR", "--datasets", "ColoredDigits", "--skip_confirmation"]
    flags += ["--n_hparams", "1", "--n_trials", "1", "--command_launcher", "ltdr_local"]
    flags += ["--hparams", '{"batch_size": 8, "moe_top_k": 9}']
    done = python("-m", "domainbed.scripts.sweep", "launch", *flags, status=1)
    assert "error: 3 of 3 jobs failed" in done.stderr
    said = [file.read_text() for file in tmp_path.glob("*/err.txt")]
    assert len(said) == 3
    assert all("moe_top_k=9 exceeds moe_num_experts=6" in text for text in said)


def test_its_own_tests_pass(python):
    pytest.importorskip("parameterized", reason="DomainBed's tests need parameterized")
    names = ["domainbed.test.scripts.test_sweep", "domainbed.test.scripts.test_collect_results"]
    assert "\nOK" in python("-m", "unittest", *names, DATA_DIR="/none").stderr


def test_doctor_says_what_is_added(monkeypatch, clone):
    monkeypatch.setattr(sys, "path", [str(clone), *sys.path])
    monkeypatch.setattr(doctor, "_hook_is_active", lambda: True)
    found = doctor._domainbed()
    assert f"the checkout at {clone / 'domainbed'}, with ERM_ViT" in found.detail


def test_the_checkout_is_as_it_was(sweep, clone):
    # the last test: everything above has run in the copy
    command = ["git", "-C", str(clone), "status", "--porcelain"]
    before = ["git", "-C", str(checkout()), "status", "--porcelain"]
    state, expected = (
        subprocess.run(c, capture_output=True, text=True, check=True).stdout
        for c in (command, before)
    )
    assert state == expected
