"""Published numbers: copied right, told apart from ours, and where they came from."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from sweep_records import make_record, write_sweep

from domainbed_ext.errors import UsageError
from domainbed_ext.published import PUBLISHED_COLUMNS, published_frame, published_sources
from domainbed_ext.records import load_records
from domainbed_ext.report import make_report, report_tables
from domainbed_ext.scripts import collect_results
from domainbed_ext.selection import SELECTION_METHODS
from domainbed_ext.table_names import AVERAGE, UPSTREAM_ENVIRONMENTS

ROOT = Path(__file__).resolve().parents[2]
FIRST_ONLY = "test environment 0 only (inferred)"
FIVE = ("PACS", "VLCS", "OfficeHome", "TerraIncognita", "DomainNet")


def test_the_files_of_the_repository_are_those_of_the_package():
    files = sorted(ROOT.glob("results/reference/*.csv"))
    assert [file.stem for file in files] == published_sources()
    assert len(files) > 10
    for file in files:
        frame = published_frame([file.stem])
        assert tuple(frame.columns) == PUBLISHED_COLUMNS
        assert frame["source"].nunique() == 1
        assert len(frame) == len(pd.read_csv(file))


def test_every_row_says_what_it_is():
    frame = published_frame()
    for row in frame.itertuples():
        assert row.environment in {AVERAGE, *UPSTREAM_ENVIRONMENTS[row.dataset]}
        assert row.protocol in {"every domain held out in turn", FIRST_ONLY}
        assert row.selection in {"not stated", *(method.name for method in SELECTION_METHODS)}
        assert row.table or row.quoted_by
        assert row.algorithm
        assert row.backbone
        assert 0 < row.mean < 100
    assert not frame.drop(columns=["mean", "stderr", "note"]).duplicated().any()


# Means over data sets that the sources print themselves: they find a digit that was copied wrong.
@pytest.mark.parametrize(
    ("source", "algorithm", "backbone", "mean"),
    [
        ("gmoe", "ERM", "ViT-S/16, DeiT, ImageNet-1k", 65.5),
        ("gmoe", "GMoE", "ViT-S/16, DeiT, ImageNet-1k", 67.9),
        ("domainbed", "ERM", "ResNet-50, ImageNet-1k", 63.3),
        ("swad", "SWAD", "ResNet-50, ImageNet-1k", 66.9),
        ("genie", "GENIE", "ResNet-50, ImageNet-1k", 66.9),
        ("diwa", "DiWA", "ResNet-50, ImageNet-1k", 68.0),
        ("eoa", "EoA", "ResNet-50, ImageNet-1k", 68.0),
        ("qt_dog", "EoQ", "ResNet-50, ImageNet-1k", 68.4),
        ("clip", "CLIP, zero-shot", "ViT-B/16, CLIP", 70.2),
        ("miro", "ERM, all weights tuned", "ViT-B/16, CLIP", 61.1),
        ("moa", "MoA", "ViT-B/16, OpenCLIP", 77.3),
        ("dpr", "DPR", "ViT-B/16, CLIP", 77.8),
        ("clipood", "CLIPood", "ViT-B/16, CLIP", 78.6),
        ("boa", "BOA", "ViT-B/16, CLIP", 78.1),
        ("clipceil", "CLIPCEIL++", "ViT-B/16, CLIP", 79.1),
        ("sbgen", "SBGen", "ViT-B/16, CLIP", 80.4),
    ],
)
def test_data_sets_average_to_what_the_source_says(source, algorithm, backbone, mean):
    frame = published_frame([source])
    own = frame[(frame["algorithm"] == algorithm) & (frame["backbone"] == backbone)]
    own = own[(own["environment"] == AVERAGE) & own["dataset"].isin(FIVE)]
    assert sorted(own["dataset"]) == sorted(FIVE)
    assert own["mean"].mean() == pytest.approx(mean, abs=0.0501)


def test_domains_average_to_what_the_source_says():
    frame = published_frame(["domainbed", "miro"])
    frame = frame[frame["backbone"].str.startswith("ResNet")]
    for (source, dataset), own in frame.groupby(["source", "dataset"]):
        means = own.set_index("environment")["mean"]
        domains = means.drop(AVERAGE)
        if list(domains.index) == list(UPSTREAM_ENVIRONMENTS[dataset]):
            assert domains.mean() == pytest.approx(means[AVERAGE], abs=0.0501), (source, dataset)


def test_ltdrs_table_2_is_of_one_test_environment():
    frame = published_frame(["ltdr"])
    assert len(frame) == 24
    assert set(frame["protocol"]) == {FIRST_ONLY}
    assert set(frame["selection"]) == {"not stated"}
    first = frame["dataset"].map(lambda name: UPSTREAM_ENVIRONMENTS[name][0])
    assert (frame["environment"] == first).all()
    frame[["algorithm", "setting"]] = frame["algorithm"].str.split(" ", expand=True)
    # The averages that v1 prints, over twelve cells, and v2, which keeps six of them.
    means = frame.groupby("algorithm")["mean"].mean()
    assert means.to_dict() == pytest.approx({"GMoE": 80.4, "LTDR": 81.3}, abs=0.0501)
    kept = frame[(frame["setting"] != "4Top1") & (frame["dataset"] != "DomainNet")]
    means = kept.groupby("algorithm")["mean"].mean()
    assert means.to_dict() == pytest.approx({"GMoE": 84.5, "LTDR": 86.1}, abs=0.0501)


def test_those_who_quote_dynmoe_disagree():
    frame = published_frame(["dynmoe"])
    pacs = frame[frame["dataset"] == "PACS"].set_index("quoted_by")["mean"]
    assert (pacs["LTDR v1, table 2"], pacs["a later paper"]) == (87.6, 88.4)
    assert frame["note"].str.contains("disagree").all()


def test_an_unknown_source_is_refused():
    with pytest.raises(UsageError, match=r"no published numbers of 'gmo'; choose among .*gmoe, "):
        published_frame(["gmo"])


@pytest.fixture
def pacs_sweep(tmp_path):
    accs = {"in_acc": [0.81, 0.72, 0.95, 0.7], "out_acc": [0.9] * 4}
    records = [make_record([env], dataset="PACS", algorithm="LTDR", **accs) for env in range(4)]
    return write_sweep(tmp_path / "sweep", records)


def _collect(capsys, folder, *flags):
    assert collect_results.main(["--input_dir", str(folder), *flags]) == 0
    return capsys.readouterr().out


def test_they_stand_below_our_table_in_the_columns_they_are_of(pacs_sweep, capsys):
    flags = ["--selection", "training-domain", "--format", "markdown"]
    ours = _collect(capsys, pacs_sweep, *flags)
    printed = _collect(capsys, pacs_sweep, *flags, "--published", "gmoe", "ltdr", "domainbed")
    assert printed.startswith(ours.rstrip("\n"))
    below = printed[len(ours.rstrip("\n")) :]
    assert "### PACS: published test accuracy in %, not ours, selected by training-domain" in below
    assert "| Published | from | backbone | protocol | A | C | P | S | Avg |" in below
    vit, turn = "ViT-S/16, DeiT, ImageNet-1k", "every domain held out in turn"
    assert f"| GMoE | GMoE 2023, table 1 | {vit} | {turn} |  |  |  |  | 88.1 ± 0.1 |" in below
    first = f"{FIRST_ONLY}, selection not stated"
    assert f"| LTDR 6Top2 | LTDR 2025, v1, table 2 | {vit} | {first} | 92.1 |  |  |  |  |" in below
    assert "| 84.7 | 80.8 | 97.2 | 79.3 | 85.5 |" in below
    assert "- LTDR: no test domain is named;" in below
    assert "compare with our column of that environment only" in below


def test_without_names_all_are_printed_under_the_method_they_used(pacs_sweep):
    report = make_report(load_records(pacs_sweep), published=[])
    tables = {
        table.title.rpartition(", selected by ")[2]: table
        for table in report_tables(report)
        if "published" in table.title
    }
    assert list(tables) == [method.name for method in SELECTION_METHODS]
    names = [{row[0] for row in table.rows} for table in tables.values()]
    # BOA selects by the oracle; LTDR does not say.
    assert ["BOA" in found for found in names] == [False, False, True]
    assert ["SWAD" in found for found in names] == [True, False, False]
    assert all("LTDR 4Top1" in found for found in names)


def test_programs_get_them_apart_from_ours(pacs_sweep, capsys):
    flags = ["--selection", "training-domain", "--published", "ltdr", "gmoe"]
    rows = json.loads(_collect(capsys, pacs_sweep, *flags, "--format", "json"))["rows"]
    ours = [row for row in rows if row["metric"] == "accuracy"]
    assert [row["mean"] for row in ours] == [81.0, 72.0, 95.0, 70.0, 79.5]
    assert {row["algorithm"] for row in ours} == {"LTDR"}
    theirs = [row for row in rows if row["metric"] == "published_accuracy"]
    assert len(theirs) == 6 + 3
    assert {row["source"] for row in theirs} == {"LTDR", "GMoE"}
    assert all(row["trials"] is None for row in theirs)
    text = _collect(capsys, pacs_sweep, *flags, "--format", "csv")
    assert re.search(r"^training-domain validation set,PACS,LTDR,A,accuracy,81.0,,1,,", text, re.M)
    for name in ("rich", "latex", "html"):
        assert "92.1" in _collect(capsys, pacs_sweep, *flags, "--format", name)


def test_a_data_set_that_nobody_has_published_on_is_named(tmp_path, capsys):
    accs = {"in_acc": [0.5] * 3, "out_acc": [0.5] * 3}
    write_sweep(tmp_path, [make_record([0], algorithm="LTDR", **accs)])
    assert "Note: no published numbers of Debug28." in _collect(capsys, tmp_path, "--published")


@pytest.mark.parametrize("flags", [["--latex"], ["--format", "domainbed"]])
def test_domainbeds_text_has_none(pacs_sweep, capsys, flags):
    arguments = ["--input_dir", str(pacs_sweep), *flags, "--published"]
    assert collect_results.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: --published adds tables that DomainBed's")
