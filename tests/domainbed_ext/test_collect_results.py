"""The command lines collect_results and list_top_hparams, end to end on hand-made sweeps."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sweep_records import hand_made_records, make_record, write_sweep
from upstream_checkout import checkout, needs_upstream, run_upstream

from domainbed_ext.hparams import default_hparams, random_hparams
from domainbed_ext.records import read_records, write_records
from domainbed_ext.scripts import collect_results, list_top_hparams
from domainbed_ext.seeds import job_hash, seed_hash

FORMATS = {
    "rich": "txt",
    "domainbed": "txt",
    "markdown": "md",
    "latex": "tex",
    "csv": "csv",
    "json": "json",
    "html": "html",
}

# Written down from DomainBed's format and the numbers worked out in sweep_records.py, not printed
# by our code. Its Averages take the domains a trial has: trial 0 has (50 + 20 + 90) / 3 = 53.33,
# trial 1 has 70; mean 61.67, standard error 8.33 / 1.414 = 5.89. And so on for the others.
DOMAINBED_TEXT = """\
Total records: 13

-------- Dataset: Debug28, model selection method: training-domain validation set
Algorithm             0                     1                     2                     Avg__
ERM                   60.0 +/- 7.1          20.0 +/- 0.0          90.0 +/- 0.0          56.7_

-------- Averages, model selection method: training-domain validation set
Algorithm                  Debug28                    Avg__
ERM                        61.7 +/- 5.9               61.7_

-------- Dataset: Debug28, model selection method: leave-one-domain-out cross-validation
Algorithm             0                     1                     2                     Avg__
ERM                   40.0 +/- 0.0          X                     X                     X____

-------- Averages, model selection method: leave-one-domain-out cross-validation
Algorithm                  Debug28                    Avg__
ERM                        40.0 +/- 0.0               40.0_

-------- Dataset: Debug28, model selection method: test-domain validation set (oracle)
Algorithm             0                     1                     2                     Avg__
ERM                   55.0 +/- 3.5          25.0 +/- 0.0          90.0 +/- 0.0          56.7_

-------- Averages, model selection method: test-domain validation set (oracle)
Algorithm                  Debug28                    Avg__
ERM                        57.5 +/- 1.8               57.5_
"""


@pytest.fixture
def sweep(tmp_path):
    return write_sweep(tmp_path / "sweep", hand_made_records())


def _run(main, *arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


def _fails(main, *arguments, capsys):
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_domainbeds_text_by_hand(sweep, capsys):
    printed = _run(
        collect_results.main, "--input_dir", sweep, "--format", "domainbed", capsys=capsys
    )
    lines = printed.out.splitlines()
    assert [line.rstrip() for line in lines] == [
        line.rstrip("_") for line in DOMAINBED_TEXT.splitlines()
    ]
    # Every cell is padded (20 wide, 25 for averages), two blanks between cells and one at the end.
    assert {len(line) for line in lines if line.startswith(("Algo", "ERM"))} == {109, 80}
    assert (sweep / "results.txt").read_text() == printed.out
    assert printed.err == ""


@pytest.mark.parametrize(("name", "extension"), FORMATS.items())
def test_every_format_is_printed_and_written(sweep, capsys, name, extension):
    printed = _run(collect_results.main, "--input_dir", sweep, "--format", name, capsys=capsys)
    assert (sweep / f"results.{extension}").read_text(encoding="utf-8") == printed.out
    assert "training-domain validation set" in printed.out
    assert "ERM" in printed.out
    assert "60.0" in printed.out
    assert "\x1b" not in printed.out


def test_plain_text_is_the_default_away_from_a_terminal(sweep, capsys):
    default = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    rich = _run(collect_results.main, "--input_dir", sweep, "--format", "rich", capsys=capsys).out
    assert default == rich
    assert default.isascii()
    assert "| ERM       | 60.0 +/- 7.1 | 20.0 | 90.0 | 56.7 | 1 to 2 |" in default
    assert "X at 1, 2: leave-one-domain-out needs the runs with test_envs [1, 2] too" in default
    assert "13 records of 10 jobs." in default


def test_a_terminal_gets_rich_output(sweep, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    printed = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    assert "60.0 ± 7.1" in printed
    assert "60.0 +/- 7.1" in (sweep / "results.txt").read_text()


def test_single_env_sweeps_are_told_what_leave_one_out_needs(tmp_path, capsys):
    records = [r for r in hand_made_records() if len(r["args"]["test_envs"]) == 1]
    write_sweep(tmp_path, records)
    printed = _run(collect_results.main, "--input_dir", tmp_path, capsys=capsys).out
    assert (
        "X: leave-one-domain-out needs the runs with two test environments "
        "(a sweep with --selection leave-one-out, or without --single_test_envs)" in printed
    )


def test_domains_that_were_not_run_share_a_line(tmp_path, capsys):
    records = [r for r in hand_made_records() if r["args"]["test_envs"] == [0]]
    write_sweep(tmp_path, records)
    arguments = ["--input_dir", tmp_path, "--selection", "training-domain"]
    printed = _run(collect_results.main, *arguments, capsys=capsys).out
    assert "X at 1, 2: no run with test_envs [1], [2]\n" in printed

    # and so do algorithms that lack the same ones
    accuracies = {"in_acc": [0.5] * 3, "out_acc": [0.5] * 3}
    more = [make_record([0], algorithm=name, **accuracies) for name in ("GMOE", "LTDR")]
    more += [make_record([env], algorithm="ERM_ViT", **accuracies) for env in range(3)]
    write_sweep(tmp_path / "more", [*records, *more])
    arguments[1] = tmp_path / "more"
    printed = _run(collect_results.main, *arguments, capsys=capsys).out
    assert "X at ERM, GMOE, LTDR (1, 2): no run with test_envs [1], [2]\n" in printed


def test_selection_limits_the_tables(sweep, capsys):
    for extra in (["--format", "domainbed"], []):
        arguments = ["--input_dir", sweep, "--selection", "oracle", *extra]
        printed = _run(collect_results.main, *arguments, capsys=capsys).out
        assert "oracle" in printed
        assert "training-domain" not in printed
    error = _fails(collect_results.main, "--input_dir", sweep, "--selection", "best", capsys=capsys)
    assert error.startswith("error: unknown selection method 'best'")


def test_csv_and_json_hold_the_same_rows(sweep, capsys):
    text = _run(collect_results.main, "--input_dir", sweep, "--format", "csv", capsys=capsys).out
    rows = list(csv.DictReader(io.StringIO(text)))
    content = json.loads(
        _run(collect_results.main, "--input_dir", sweep, "--format", "json", capsys=capsys).out
    )
    assert content["total_records"] == 13
    assert content["jobs"] == {"total": 10, "unfinished": [], "failed": [], "empty": []}
    assert len(rows) == len(content["rows"]) == 3 * 4 + 3
    first = content["rows"][0]
    assert (first["environment"], first["mean"], first["stderr"]) == ("0", 60.0, 7.071068)
    missing = next(row for row in content["rows"] if row["mean"] is None)
    assert missing["reason"].startswith("leave-one-domain-out")
    assert [float(row["mean"] or "nan") for row in rows if row["mean"]] == [
        row["mean"] for row in content["rows"] if row["mean"] is not None
    ]


class _Page(HTMLParser):
    """Checks that every element is closed, and gathers tables and links."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids, self.rows = [], [], [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("href", "src") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "tr":
            self.rows.append([])
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("th", "td"):
            self.rows[-1].append(data)


def test_html_is_one_whole_page(sweep, capsys):
    arguments = ["--input_dir", sweep, "--format", "html", "--published", "ltdr"]
    text = _run(collect_results.main, *arguments, capsys=capsys).out
    page = _Page()
    page.feed(text)
    assert page.open == []
    assert page.links == [f"#{name}" for name in page.ids] == ["#table1", "#table2", "#table3"]
    assert page.rows[:2] == [
        ["Algorithm", "0", "1", "2", "Avg", "trials"],
        ["ERM", "60.0 ± 7.1", "20.0", "90.0", "56.7", "1 to 2"],
    ]
    assert "url(" not in text
    assert "@import" not in text


def test_names_are_escaped(tmp_path, capsys):
    record = make_record(
        [0],
        dataset="folder:/a_b",
        algorithm="A|<b>_&",
        in_acc=[0.5, 0.5],
        out_acc=[0.5, 0.5],
        provenance={"environments": ["50%", "x"]},
    )
    write_sweep(tmp_path, [record])
    outputs = {
        name: _run(
            collect_results.main, "--input_dir", tmp_path, "--format", name, capsys=capsys
        ).out
        for name in ("markdown", "latex", "html")
    }
    assert r"A\|<b>_&" in outputs["markdown"]
    assert r"A|<b>\_\&" in outputs["latex"]
    assert r"50\%" in outputs["latex"]
    assert "A|&lt;b&gt;_&amp;" in outputs["html"]


def test_unfinished_jobs_are_counted(tmp_path, capsys):
    write_sweep(tmp_path, hand_made_records(), unfinished=["f" * 32])
    printed = _run(collect_results.main, "--input_dir", tmp_path, capsys=capsys)
    assert "13 records of 11 jobs, 1 unfinished" in printed.out
    assert "Note: 1 of 11 jobs are unfinished" in printed.out
    arguments = ["--input_dir", tmp_path, "--format", "domainbed"]
    printed = _run(collect_results.main, *arguments, capsys=capsys)
    assert "unfinished" not in printed.out
    assert "note: 1 of 11 jobs are unfinished" in printed.err


def emojidg_records(runs, algorithm="LTDR"):
    """One record for each (test_envs, accuracy on unseen concepts)."""
    records = []
    for test_envs, unseen in runs:
        extra = {f"env{env}_unseen_acc": unseen for env in range(2)}
        extra |= {f"env{env}_unseen_class_acc": unseen - 0.02 for env in range(2)}
        extra["provenance"] = {"environments": ["twemoji", "openmoji"]}
        records.append(
            make_record(
                test_envs,
                dataset="EmojiDG",
                algorithm=algorithm,
                in_acc=[0.6, 0.65],
                out_acc=[0.5, 0.5],
                **extra,
            )
        )
    return records


def test_emojidg_gets_its_own_table(tmp_path, capsys):
    write_sweep(tmp_path, emojidg_records([([0], 0.40), ([1], 0.30), ([], 0.55)]))
    arguments = ["--input_dir", tmp_path, "--format", "markdown", "--selection", "training-domain"]
    printed = _run(collect_results.main, *arguments, capsys=capsys).out
    assert "EmojiDG: accuracy on unseen concepts in %" in printed
    assert "| LTDR | 40.0 | 30.0 | 35.0 | 1 |" in printed
    assert "| LTDR | twemoji | 60.0 | 40.0 | 38.0 | 55.0 | 15.0 | 1 |" in printed
    assert "| LTDR | openmoji | 65.0 | 30.0 | 28.0 | 55.0 | 25.0 | 1 |" in printed
    assert "| LTDR | Avg | 62.5 | 35.0 | 33.0 | 55.0 | 20.0 | 1 |" in printed


def test_emojidg_shows_the_domains_that_are_held_out(tmp_path, capsys):
    runs = [([1], 0.30), ([], 0.55)]
    records = emojidg_records(runs) + emojidg_records([([1], 0.25), ([], 0.45)], "GMOE")
    write_sweep(tmp_path, records)
    arguments = ["--input_dir", tmp_path, "--format", "markdown", "--selection", "training-domain"]
    arguments += ["--baseline", "LTDR"]
    printed = _run(collect_results.main, *arguments, capsys=capsys).out
    assert "| LTDR | X | 30.0 | X | 1 |" in printed
    assert "| LTDR | openmoji | 65.0 | 30.0 | 28.0 | 55.0 | 25.0 | 1 |" in printed
    assert "| GMOE | openmoji | +0.0 | -5.0 | -10.0 | -5.0 | 1 |" in printed
    assert "| twemoji |" not in printed.replace("| Algorithm | twemoji |", "")
    assert printed.count("- left out, since no run holds them out: twemoji\n") == 2
    printed = _run(collect_results.main, *arguments[:2], "--format", "csv", capsys=capsys).out
    assert "LTDR,twemoji,ceiling,55.0" in printed


def test_mixed_records_are_refused_unless_allowed(tmp_path, capsys):
    records = hand_made_records()
    for index, record in enumerate(records):
        record["provenance"] = {"data_fingerprint": str(index % 2)}
    write_sweep(tmp_path, records)
    for extra in ([], ["--format", "domainbed"], ["--latex"]):
        error = _fails(collect_results.main, "--input_dir", tmp_path, *extra, capsys=capsys)
        assert "data_fingerprint '0' and '1'" in error
        assert not list(tmp_path.glob("results.*"))
    printed = _run(collect_results.main, "--input_dir", tmp_path, "--allow-mixed", capsys=capsys)
    assert "60.0" in printed.out


def test_a_copy_of_a_job_counts_once(sweep, capsys):
    before = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    # Two test environments: twice, leave-one-domain-out would find no single record per step.
    job = next(p for p in sorted(sweep.iterdir()) if p.is_dir() and len(_test_envs(p)) == 2)
    shutil.copytree(job, sweep / f"{job.name} (copy)")
    after = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    note = f"\nNote: {job.name} (copy) is a copy of {job.name} and was left out.\n"
    assert after == before.replace("of 10 jobs", "of 11 jobs") + note
    arguments = ["--input_dir", sweep, "--format", "domainbed"]
    printed = _run(collect_results.main, *arguments, capsys=capsys)
    assert printed.out.startswith("Total records: 14\n")
    assert printed.err.endswith(f"is a copy of {job.name}; DomainBed's text takes both\n")


def _test_envs(job):
    return read_records(job / "results.jsonl")[0]["args"]["test_envs"]


@pytest.mark.parametrize("extra", [[], ["--format", "domainbed"]])
def test_two_runs_of_one_job_are_refused_unless_allowed(sweep, capsys, extra):
    job = next(path for path in sorted(sweep.iterdir()) if path.is_dir())
    other = Path(shutil.copytree(job, sweep / "again"))
    records = read_records(other / "results.jsonl")
    records[-1]["env1_out_acc"] += 0.1
    write_records(other / "results.jsonl", records)
    error = _fails(collect_results.main, "--input_dir", sweep, *extra, capsys=capsys)
    assert error.startswith(f"error: {job} and {other} hold two different runs of one job (ERM on")
    assert error.count("\n") == 1
    allowed = ["--input_dir", sweep, "--allow-mixed", *extra]
    first = _run(collect_results.main, *allowed, capsys=capsys).out.splitlines()[0]
    assert first.startswith(("14 records of 11 jobs", "Total records: 14"))


def test_what_was_only_half_copied_is_said(sweep, capsys, caplog):
    before = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    (sweep / "gone").mkdir()
    (sweep / "gone" / "done").write_text("done")
    (sweep / "cut").mkdir()
    record = json.dumps(make_record([0], in_acc=[0, 0, 0], out_acc=[0, 0, 0]))
    (sweep / "cut" / "results.jsonl").write_text(record[:60])
    after = _run(collect_results.main, "--input_dir", sweep, capsys=capsys).out
    assert "13 records of 12 jobs, 1 unfinished" in after
    assert "1 of 12 jobs are finished without a record (gone); delete their folders" in after
    assert f"{sweep / 'cut' / 'results.jsonl'}, line 1 is cut off and was left out" in caplog.text
    assert [line for line in after.splitlines() if line.startswith("|")] == [
        line for line in before.splitlines() if line.startswith("|")
    ]


def test_a_folder_of_sweeps_is_told_from_a_sweep(sweep, capsys):
    error = _fails(collect_results.main, "--input_dir", sweep.parent, capsys=capsys)
    assert f"holds no jobs (no <job>/results.jsonl); {sweep} does; give" in error


@pytest.mark.parametrize("main", [collect_results.main, list_top_hparams.main])
def test_folders_without_results_end_in_one_line(tmp_path, capsys, main):
    rest = []
    if main is list_top_hparams.main:
        rest = ["--dataset", "Debug28", "--algorithm", "ERM", "--test_env", "0"]
    assert "does not exist" in _fails(main, "--input_dir", tmp_path / "no", *rest, capsys=capsys)
    assert "holds no jobs" in _fails(main, "--input_dir", tmp_path, *rest, capsys=capsys)
    write_sweep(tmp_path, [], unfinished=["0" * 32])
    error = _fails(main, "--input_dir", tmp_path, *rest, capsys=capsys)
    assert "holds 1 jobs but no record yet, 1 of them unfinished" in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    (tmp_path / ("0" * 32) / "results.jsonl").write_text("{}\n{}\n")
    error = _fails(main, "--input_dir", tmp_path, *rest, capsys=capsys)
    assert f"{'0' * 32}/results.jsonl, line 1" in error


def test_a_folder_that_cannot_be_written_still_gives_the_table(sweep, capsys):
    (sweep / "results.txt").mkdir()
    printed = _run(collect_results.main, "--input_dir", sweep, capsys=capsys)
    assert "60.0" in printed.out
    assert f"warning: could not write {sweep / 'results.txt'}" in printed.err


def test_flags_are_frozen():
    """Removing or renaming one breaks scripts: it takes a forwarding shim."""
    flags = {action.dest for action in collect_results.build_parser()._actions}
    assert flags == {
        *("help", "input_dir", "latex"),
        *("format", "selection", "baseline", "published", "costs", "allow_mixed"),
    }


def test_latex_excludes_another_format(sweep, capsys):
    arguments = ["--input_dir", sweep, "--latex", "--format", "csv"]
    assert "excludes --format csv" in _fails(collect_results.main, *arguments, capsys=capsys)


def test_top_hparams_are_ranked(sweep, capsys):
    flags = ["--input_dir", sweep, "--dataset", "Debug28", "--algorithm", "ERM", "--test_env", "0"]
    text = _run(list_top_hparams.main, *flags, capsys=capsys).out
    first, second, *_ = [line.strip() for line in text.splitlines() if "val_acc" in line]
    assert first == "val_acc: 0.7, test_acc: 0.5, step: 10"
    assert second == "val_acc: 0.6, test_acc: 0.3, step: 0"
    assert "lr: 0.1" in text
    assert "trial_seed 1: nothing to rank, " in text
    top = _run(list_top_hparams.main, *flags, "--top", "1", capsys=capsys).out
    assert top.count("val_acc") < text.count("val_acc")
    rich = _run(list_top_hparams.main, *flags, "--format", "rich", capsys=capsys).out
    assert "70.0" in rich
    assert "lr=0.1" in rich


def test_top_hparams_say_what_there_is_instead(sweep, capsys):
    flags = ["--input_dir", sweep, "--dataset", "Debug28", "--algorithm", "LTDR", "--test_env", "0"]
    error = _fails(list_top_hparams.main, *flags, capsys=capsys)
    assert "no records of LTDR on Debug28" in error
    assert "ERM on Debug28 with test_env [0, 1, 2]" in error
    assert "--top 0" in _fails(list_top_hparams.main, *flags, "--top", "0", capsys=capsys)


def test_reading_tables_needs_no_torch(sweep):
    code = (
        "import sys; from domainbed_ext.scripts import collect_results;"
        f"collect_results.main(['--input_dir', {str(sweep)!r}]);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def upstream_sweep(tmp_path):
    """A copy of DomainBed's test sweep, 40 jobs of ERM on VLCS: results.txt gets rewritten."""
    source = checkout() / "domainbed" / "misc" / "test_sweep_data"
    return Path(shutil.copytree(source, tmp_path / "upstream"))


@pytest.mark.upstream
@needs_upstream
def test_upstreams_test_sweep_gives_upstreams_bytes(upstream_sweep, capsys):
    expected = checkout() / "domainbed" / "misc" / "test_sweep_results.txt"
    arguments = ["--input_dir", upstream_sweep, "--format", "domainbed"]
    assert _run(collect_results.main, *arguments, capsys=capsys).out == expected.read_text()


@pytest.mark.upstream
@needs_upstream
@pytest.mark.parametrize("flags", [[], ["--latex"]])
@pytest.mark.parametrize("kind", ["upstream", "hand-made"])
def test_upstreams_collect_results_prints_the_same(
    upstream_sweep, sweep, tmp_path, capsys, flags, kind
):
    folder = upstream_sweep
    if kind == "hand-made":
        # Several algorithms and data sets, in an order that upstream has to change; and gaps.
        folder = tmp_path / "several"
        for algorithm in ("IRM", "ERM"):
            for dataset in ("PACS", "Debug28", "ColoredMNIST"):
                write_sweep(folder, hand_made_records(algorithm=algorithm, dataset=dataset))
        write_sweep(folder, hand_made_records(algorithm="Mixup", dataset="VLCS")[:5])
    theirs = run_upstream(
        "-m", "domainbed.scripts.collect_results", "--input_dir", str(folder), *flags
    )
    arguments = ["--input_dir", folder, "--format", "domainbed", *flags]
    assert _run(collect_results.main, *arguments, capsys=capsys).out == theirs


@pytest.mark.upstream
@needs_upstream
def test_upstreams_jobs_have_our_names_seeds_and_hparams(upstream_sweep):
    jobs = [job for job in upstream_sweep.iterdir() if job.is_dir()]
    assert len(jobs) == 40
    for job in jobs:
        record = read_records(job / "results.jsonl")[0]
        args = record["args"]
        seeds = args["hparams_seed"], args["trial_seed"]
        assert args["seed"] == seed_hash("VLCS", "ERM", args["test_envs"], *seeds)
        hashed = (
            "algorithm data_dir dataset holdout_fraction hparams_seed seed steps task test_envs "
            "trial_seed"
        )
        assert job.name == job_hash({name: args[name] for name in hashed.split()})
        if args["hparams_seed"]:
            hparams = random_hparams("ERM", "VLCS", seed_hash(*seeds))
        else:
            hparams = default_hparams("ERM", "VLCS")
        # The sweep was recorded by an older version, which had fewer hyper-parameters.
        assert record["hparams"] == {name: hparams[name] for name in record["hparams"]}
