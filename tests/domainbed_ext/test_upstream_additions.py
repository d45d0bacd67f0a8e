"""What a checkout gets, and what it keeps; with a stand-in for DomainBed."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_checkout import MODULES, write_checkout

import domainbed_ext.algorithms as own_algorithms
from domainbed_ext import upstream_additions
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import VIT_ALGORITHMS, default_hparams, hparam_pairs, random_hparams
from domainbed_ext.upstream_additions import lacking_names
from tests.teachers import untrained_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def enter(tmp_path, monkeypatch):
    """Makes a stand-in checkout, switches the hook on, and gives a function that imports."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(upstream_additions, "_complaints", [])
    monkeypatch.delenv("DOMAINBED_EXT", raising=False)
    before = dict(sys.modules)

    def enter(**changed):
        sys.path.insert(0, str(write_checkout(tmp_path / "checkout", **changed)))
        importlib.invalidate_caches()
        startup = importlib.import_module("domainbed_ext._startup")
        startup.install()
        return lambda module: importlib.import_module(f"domainbed.{module}")

    yield enter
    for name in [name for name in sys.modules if name.split(".")[0] == "domainbed"]:
        del sys.modules[name]
    sys.modules.update({k: v for k, v in before.items() if k.split(".")[0] == "domainbed"})
    sys.modules.pop("domainbed_ext._startup", None)


def show(tmp_path, script, *args):
    """What a script of the stand-in checkout prints, in a process of its own."""
    checkout = write_checkout(tmp_path / "checkout")
    start = tmp_path / "start"
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text("import domainbed_ext._startup\n")
    env = {k: v for k, v in os.environ.items() if k != "DOMAINBED_EXT"}
    env["PYTHONPATH"] = os.pathsep.join([str(start), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", f"domainbed.scripts.{script}", *args],
        capture_output=True,
        text=True,
        cwd=checkout,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_algorithms_are_ours_under_their_names(enter):
    algorithms = enter()("algorithms")
    assert algorithms.ALGORITHMS == ["ERM", "Fish", *VIT_ALGORITHMS]
    for name in VIT_ALGORITHMS:
        found = algorithms.get_algorithm_class(name)
        assert issubclass(found, own_algorithms.get_algorithm_class(name))
        assert found.__name__ == name
    assert algorithms.ERM.__module__ == "domainbed.algorithms"


def test_the_guide_lists_them_all():
    guide = (ROOT / "docs" / "domainbed.md").read_text(encoding="utf-8")
    (row,) = [line for line in guide.splitlines() if line.startswith("| `algorithms` |")]
    assert [name for name in VIT_ALGORITHMS if f"`{name}`" not in row] == []


def test_everything_survives_a_reload(enter):
    load = enter()
    modules = [load(name) for name in ("algorithms", "datasets", "hparams_registry", "networks")]
    launchers = load("command_launchers")
    for _ in range(2):
        for module in (*modules, launchers):
            importlib.reload(module)
    algorithms, datasets, registry, networks = modules
    assert algorithms.ALGORITHMS == ["ERM", "Fish", *VIT_ALGORITHMS]
    assert datasets.DATASETS == ["Debug28", "PACS", "RotatedDigits", "ColoredDigits"]
    assert registry.default_hparams("GMOE", "PACS")["moe_top_k"] == 1
    assert networks.Featurizer((1, 28, 28), {}) == "a network for digits"
    assert sorted(launchers.REGISTRY) == ["local", "ltdr_local", "ltdr_slurm"]


def test_extending_twice_changes_nothing(enter):
    load = enter()
    for name in ("algorithms", "datasets", "hparams_registry", "networks", "command_launchers"):
        module = load(name)
        upstream_additions.extend(module)
        function = getattr(module, {"hparams_registry": "_hparams"}.get(name, "Featurizer"), None)
        if function is not None:
            assert not hasattr(function.__wrapped__, "__wrapped__")
    assert load("algorithms").ALGORITHMS.count("LTDR") == 1
    assert upstream_additions._complaints == []


def test_hparams_are_ours_for_ours_and_theirs_for_theirs(enter):
    registry = enter()("hparams_registry")
    for name in VIT_ALGORITHMS:
        for dataset in ("Debug28", "PACS", "SVIRO", "RotatedDigits"):
            own = hparam_pairs(name, dataset, 3)
            drawn = registry.random_hparams(name, dataset, 3)
            assert drawn.pop("schedule_steps") > 0
            assert drawn == {k: pair[1] for k, pair in own.items() if k != "schedule_steps"}
    assert registry.random_hparams("ERM", "PACS", 3) == {"lr": 3 / 7, "asked": "PACS"}
    assert registry.default_hparams("Nobody", "PACS") == {"lr": 5e-5, "asked": "Nobody"}
    # DomainBed's own grid for digits, but batches that a domain of them can fill
    drawn = registry.random_hparams("Fish", "ColoredDigits", 3)
    assert drawn["asked"] == "ColoredMNIST"
    assert drawn["batch_size"] == random_hparams("ERM", "ColoredDigits", 3)["batch_size"]


def test_versions_that_hand_over_a_generator_draw_from_it(enter):
    registry = enter()("hparams_registry")
    draws = [
        registry._hparams("LTDR", "PACS", np.random.RandomState(seed))["lr"][1]
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_schedule_steps_is_the_data_sets_number_of_steps(enter):
    load = enter()
    registry, _ = load("hparams_registry"), load("datasets")
    expected = {"Debug28": 17, "RotatedDigits": 301, "PACS": 5001}
    for dataset, steps in expected.items():
        assert registry.default_hparams("LTDR", dataset)["schedule_steps"] == steps


def test_a_name_that_the_checkout_has_stays_its_own(enter, caplog):
    source = MODULES["algorithms"] + "\nclass GMOE:\n    pass\n"
    load = enter(algorithms=source)
    with caplog.at_level(logging.WARNING):
        algorithms = load("algorithms")
    assert algorithms.GMOE.__module__ == "domainbed.algorithms"
    assert load("hparams_registry").default_hparams("GMOE", "PACS")["asked"] == "GMOE"
    assert algorithms.ALGORITHMS == ["ERM", "Fish", *[n for n in VIT_ALGORITHMS if n != "GMOE"]]
    assert [r.getMessage() for r in caplog.records] == [
        "gmoe-ltdr: this DomainBed has its own GMOE, which it keeps"
    ]


def test_the_contract_of_an_algorithm(enter, caplog):
    load = enter()
    registry, algorithms = load("hparams_registry"), load("algorithms")
    hparams = registry.default_hparams("LTDR", "Debug28")
    hparams.update({"lr": 1, "resnet18": True, "schedule": "cosine"})
    given = dict(hparams)
    with caplog.at_level(logging.WARNING):
        algorithm = algorithms.get_algorithm_class("LTDR")((3, 28, 28), 2, 2, hparams)
    assert hparams == given  # DomainBed writes this very object into the records
    assert json.loads(json.dumps(hparams)) == hparams
    assert "LTDR takes no hparam resnet18: ignored" in caplog.text
    batch = (torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1]))
    numbers = algorithm.update([batch, batch], None)
    assert {type(value) for value in numbers.values()} == {float}
    algorithm.eval()
    assert algorithm.predict(batch[0][:1]).shape == (1, 2)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"moe_top_k": 9}, "moe_top_k=9 exceeds"), ({"lr": "high"}, "hparam lr='high' is impossible")],
)
def test_impossible_hparams_are_refused(enter, change, said):
    algorithms = enter()("algorithms")
    hparams = {**default_hparams("LTDR", "Debug28"), **change}
    with pytest.raises(UsageError, match=said):
        algorithms.LTDR((3, 28, 28), 2, 2, hparams)
    del hparams["backbone"]
    with pytest.raises(UsageError, match="LTDR needs the hparams backbone"):
        algorithms.LTDR((3, 28, 28), 2, 2, hparams)


@pytest.mark.parametrize("name", ["CLUSTER", "DISTRIBUTION"])
def test_what_looks_at_the_images_first_stops_at_the_first_step(enter, name):
    load = enter()
    hparams = load("hparams_registry").default_hparams(name, "Debug28")
    algorithm = load("algorithms").get_algorithm_class(name)((3, 28, 28), 2, 2, hparams)
    batch = (torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(UsageError, match=f"{name} looks at all training images") as caught:
        algorithm.update([batch, batch], None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--test_envs", "0"], None),
        (["--test_envs", "0", "1"], "was trained on domain 1, which this run is to be tested on"),
        (["--trial_seed", "1"], "has trial_seed 0, not 1"),
        (["--holdout_fraction", "0.5"], r"has holdout_fraction 0\.2, not 0\.5"),
    ],
)
def test_a_teacher_that_has_seen_the_test_domain_is_refused(enter, run_as, flags, said):
    run_as("train", "--dataset", "Debug28", *flags)
    load = enter()
    hparams = load("hparams_registry").default_hparams("DISTILL", "Debug28")
    hparams["distill_teacher"] = untrained_teacher()

    def create():
        return load("algorithms").DISTILL((3, 28, 28), 2, 2, hparams)

    if said is None:
        batch = (torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1]))
        assert create().update([batch, batch], None)["distillation_loss"] > 0
    else:
        with pytest.raises(UsageError, match=said):
            create()


def test_small_digits_have_a_network(enter):
    networks = enter()("networks")
    network = networks.Featurizer((2, 16, 16), {})
    assert network(torch.zeros(3, 2, 16, 16)).shape == (3, network.n_outputs)
    with pytest.raises(NotImplementedError):
        networks.Featurizer((3, 96, 96), {})


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("algorithms", "ALGORITHMS"),
        ("hparams_registry", "_hparams"),
        ("datasets", "DATASETS"),
        ("networks", "Featurizer"),
        ("command_launchers", "REGISTRY"),
    ],
)
def test_an_unknown_version_costs_one_line(enter, caplog, tmp_path, module, missing):
    load = enter(**{module: "LIST = []\n", "networks": "x = 1\n"})
    with caplog.at_level(logging.WARNING):
        assert load(module).__name__ == f"domainbed.{module}"
        load("networks")
    (record,) = caplog.records
    assert "\n" not in record.getMessage()
    place = tmp_path / "checkout" / "domainbed" / f"{module}.py"
    assert f"(domainbed.{module} has no {missing}, in {place})" in record.getMessage() or (
        module == "networks" and "has no Featurizer" in record.getMessage()
    )
    assert f"domainbed.{module}.{missing}" in lacking_names(place.parent)


def test_names_of_another_kind_cost_one_line_too(enter, caplog):
    load = enter(algorithms="ALGORITHMS = ('ERM',)\n", command_launchers="REGISTRY = None\n")
    with caplog.at_level(logging.WARNING):
        assert load("algorithms").ALGORITHMS == ("ERM",)
        assert load("command_launchers").REGISTRY is None
    (record,) = caplog.records
    assert "AttributeError: 'tuple' object has no attribute 'append'" in record.getMessage()


def test_a_known_version_lacks_nothing(tmp_path):
    assert lacking_names(write_checkout(tmp_path) / "domainbed") == []


@pytest.fixture
def run_as(monkeypatch, tmp_path):
    """Makes this process look like one of the checkout's scripts."""

    def run_as(script, *args):
        file = tmp_path / "checkout" / "domainbed" / "scripts" / f"{script}.py"
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(file), raising=False)
        folder = ["--output_dir", tmp_path / "job"] if script == "train" else []
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, [*folder, *args])])

    return run_as


def test_a_sweep_keeps_its_default_lists(enter, run_as):
    run_as("sweep", "launch")
    load = enter()
    assert load("algorithms").ALGORITHMS == ["ERM", "Fish"]
    assert load("datasets").DATASETS == ["Debug28", "PACS"]
    # and knows what can be asked for
    assert load("algorithms").get_algorithm_class("LTDR").__name__ == "LTDR"
    assert load("datasets").get_dataset_class("RotatedDigits").N_STEPS == 301


def test_tables_list_everything(enter, run_as, tmp_path):
    place = _pictures(tmp_path / "pictures")
    for job, dataset in (("1", f"folder:{place}"), ("2", "PACS"), ("3", f"folder:{place}")):
        (tmp_path / "sweep" / job).mkdir(parents=True)
        line = json.dumps({"args": {"dataset": dataset}})
        (tmp_path / "sweep" / job / "results.jsonl").write_text(line + "\n")
    (tmp_path / "sweep" / "3" / "results.jsonl").write_text("{broken")
    run_as("collect_results", "--input_dir", tmp_path / "sweep")
    load = enter()
    assert load("algorithms").ALGORITHMS == ["ERM", "Fish", *VIT_ALGORITHMS]
    assert load("datasets").DATASETS[2:] == ["RotatedDigits", "ColoredDigits", f"folder:{place}"]
    assert load("datasets").get_dataset_class(f"folder:{place}").ENVIRONMENTS == ("day", "night")


@pytest.mark.parametrize("script", ["collect_results", "list_top_hparams"])
def test_tables_name_the_domains_of_the_records(enter, run_as, tmp_path, caplog, script):
    """The images are elsewhere, or their folders have other names than when they were run."""
    place = _pictures(tmp_path / "pictures")
    recorded = {
        "folder:gone": {"provenance": {"environments": ["b", "a"]}},
        f"folder:{place}": {"provenance": {"environments": ["noon", "night"]}},
        "manifest:gone.csv": {"env0_out_acc": 0.5, "env1_out_acc": 0.5, "env2_out_acc": 0.5},
    }
    for number, (name, keys) in enumerate(recorded.items()):
        folder = tmp_path / "sweep" / str(number)
        folder.mkdir(parents=True)
        line = json.dumps({"args": {"dataset": name}, **keys})
        (folder / "results.jsonl").write_text(line + "\n")
    run_as(script, "--input_dir", tmp_path / "sweep", "--dataset", "folder:gone")
    datasets = enter()("datasets")
    names = {name: datasets.get_dataset_class(name).ENVIRONMENTS for name in recorded}
    assert [*names.values()] == [("b", "a"), ("noon", "night"), ("env0", "env1", "env2")]
    assert {*recorded} <= {*datasets.DATASETS}
    assert not caplog.records


def test_tables_of_records_that_disagree_have_neutral_names(enter, run_as, tmp_path, caplog):
    for name in ("day", "noon"):
        record = {"args": {"dataset": "folder:x"}, "provenance": {"environments": [name, "night"]}}
        (tmp_path / "sweep" / name).mkdir(parents=True)
        (tmp_path / "sweep" / name / "results.jsonl").write_text(json.dumps(record) + "\n")
    run_as("collect_results", "--input_dir", tmp_path / "sweep")
    found = enter()("datasets").get_dataset_class("folder:x")
    assert found.ENVIRONMENTS == ("env0", "env1")
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("gmoe-ltdr: records of folder:x disagree on its environments: ")
    with pytest.raises(UsageError, match="folder:x is known from records alone"):
        found("data", [0], {})


def test_a_folder_that_is_not_there_costs_one_line(enter, run_as, caplog):
    run_as("train", "--dataset=folder:nowhere")
    with caplog.at_level(logging.WARNING):
        datasets = enter()("datasets")
    assert "folder:nowhere" not in vars(datasets)
    assert [record.getMessage() for record in caplog.records] == [
        "gmoe-ltdr: no data set folder at nowhere (expected domain/class/image below it)"
    ]


def test_train_tells_what_domainbed_does_not_pass_on(tmp_path):
    place = _pictures(tmp_path / "pictures")
    shown, stderr = show(tmp_path, "train", "--dataset", f"folder:{place}", "--steps", "40")
    assert stderr == ""
    assert shown["LTDR"]["schedule_steps"] == 40
    assert shown["named"] == [f"folder:{place}"]
    assert shown["algorithms"] == ["ERM", "Fish", *VIT_ALGORITHMS]
    assert shown["launchers"] == ["local", "ltdr_local", "ltdr_slurm"]


def _pictures(root):
    for domain in ("day", "night"):
        for name in ("cat", "dog"):
            (root / domain / name).mkdir(parents=True)
            (root / domain / name / "1.png").touch()
    return root
