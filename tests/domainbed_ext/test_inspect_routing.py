"""`ltdr inspect`: from a finished run to a table, figures and JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_ext.datasets import get_dataset_class
from domainbed_ext.datasets.base import EnvSplit, FileEnvironment
from domainbed_ext.errors import UsageError
from domainbed_ext.foreground_masks import ForegroundMasks
from domainbed_ext.routing_inspection import (
    Inspection,
    compare_names,
    load_sparse_model,
    read_inspection,
)
from domainbed_ext.scripts.inspect_routing import main
from domainbed_ext.train_args import TrainArgs
from domainbed_ext.training_job import train
from gmoe_ltdr import collect_routing, preset, save_model
from gmoe_ltdr.stats import RoutingStats
from tests.models import tiny_moe_vit

LAYERS = ["blocks.0.mlp", "blocks.2.mlp"]


def finished_run(folder, algorithm="LTDR", **changes):
    args = {"dataset": "Debug28", "steps": 2, "device": "cpu", "test_envs": (2,), **changes}
    train(TrainArgs(algorithm=algorithm, output_dir=str(folder), **args))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return finished_run(tmp_path_factory.mktemp("run"), hparams={"ema_decay": 0.5})


def test_a_run(run, capsys, monkeypatch):
    monkeypatch.setattr("domainbed_ext.scripts.inspect_routing.draw", lambda *_, **__: [])
    assert main([str(run), "--split", "all"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith("routers on Debug28, split all")
    rows = [line.split() for line in printed if line.startswith(("0 ", "1 ", "2 "))]
    assert [row[0] for row in rows] == ["0", "1", "2"] * 2
    assert [row[1] for row in rows] == ["16", "16", "(unseen)"] * 2

    values = json.loads((run / "inspect" / "routing.json").read_text())
    assert [domain["trained"] for domain in values["domains"]] == [True, True, False]
    found = read_inspection(run / "inspect" / "routing.json")
    assert found.total.layers == LAYERS
    # the same numbers by hand: all images at once, through the weights that predict
    algorithm = load_sparse_model(run, device="cpu")
    dataset = get_dataset_class("Debug28")(None, [2], {})
    images = torch.stack([dataset[2][index][0] for index in range(16)])
    with collect_routing(algorithm.network) as routings, torch.no_grad():
        algorithm.predict(images)
    expected = RoutingStats(detailed=True)
    expected.add(routings)
    for layer in LAYERS:
        ours = values["domains"][2]["layers"][layer]
        by_hand = expected.of(layer).summary()
        assert ours["load"] == by_hand["load"]
        assert ours["tail_bins"] == by_hand["tail_bins"]
        assert ours["rpv"] == pytest.approx(by_hand["rpv"], rel=1e-4)
        assert len(ours["rank_norms"]) == 3


def test_images_do_not_depend_on_the_batch_size(run, tmp_path):
    for size in ("3", "64"):
        flags = ["--batch_size", size, "--format", "none", "--output_dir", str(tmp_path / size)]
        assert main([str(run), "--split", "in", *flags]) == 0
    three, many = (read_inspection(tmp_path / size / "routing.json") for size in ("3", "64"))
    for layer in LAYERS:
        ours, expected = three.total.of(layer), many.total.of(layer)
        assert ours.num_images == 2 * 13 + 13
        np.testing.assert_array_equal(ours.load_E, expected.load_E)
        np.testing.assert_allclose(ours.mean_probs_E, expected.mean_probs_E, rtol=1e-5)


def test_figures_classes_and_comparison(run, tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    drawn = {}

    def keep(self, path, **_):  # laying out and writing takes ten times as long as the rest
        drawn[path.name] = self

    monkeypatch.setattr(figure, "savefig", keep)
    other = finished_run(tmp_path / "other", "GMOE")
    assert main([str(other), "--format", "none"]) == 0
    assert drawn == {}
    flags = ["--by_class", "--max_images", "4", "--compare", str(other), "--format", "svg"]
    assert main([str(run), *flags, "--output_dir", str(tmp_path / "figures")]) == 0
    of_all = ["load", "rpv", "head_and_tail", "domains", "classes"]
    of_layers = [f"{what}_block{i}" for i in (0, 2) for what in ("rpv", "head_and_tail")]
    assert list(drawn) == [f"{name}.svg" for name in of_all + of_layers]
    curves = [text.get_text() for text in drawn["rpv.svg"].axes[0].get_legend().get_texts()]
    assert [text.split(" (")[0] for text in curves] == [f"{run.name}, vision", "other, vision"]
    names = [label.get_text() for label in drawn["domains.svg"].axes[0].get_yticklabels()]
    assert names == ["0", "1", "2 (unseen)"]
    found = read_inspection(tmp_path / "figures" / "routing.json")
    assert list(found.total.by_group()) == ["0", "1"]
    assert found.domains[0].stats.of(LAYERS[0]).num_images == 3  # all that the split has


@pytest.mark.slow
def test_figures_can_be_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([str(run), "--output_dir", str(tmp_path)]) == 0
    for name in ("load", "rpv", "head_and_tail", "domains"):
        assert Image.open(tmp_path / f"{name}.png").width > 400


def test_a_model_of_the_library(tmp_path):
    spec = preset("gmoe", num_experts=3)
    save_model(tiny_moe_vit(spec, img_size=28, num_classes=2), tmp_path / "model")
    flags = ["--dataset", "Debug28", "--format", "none"]
    assert main([str(tmp_path / "model"), *flags]) == 0
    found = read_inspection(tmp_path / "model" / "inspect" / "routing.json")
    assert [domain.trained for domain in found.domains] == [None, None, None]
    assert found.distances["blocks.0.mlp"].shape == (3, 3)
    assert (found.distances["blocks.0.mlp"] == 0).all()  # copies


def test_a_collapsed_router_is_named(tmp_path, capsys):
    model = tiny_moe_vit(preset("gmoe_dar", num_experts=3, top_k=1), img_size=28)
    with torch.no_grad():
        gate = model.blocks[2].mlp.router.gate
        gate.proj.weight.zero_()
        gate.proj.bias.fill_(1.0)
        gate.expert_embed.fill_(-1.0)
        gate.expert_embed[:, 1] = 1.0
    save_model(model, tmp_path)
    assert main([str(tmp_path), "--dataset", "Debug28", "--format", "none"]) == 0
    out = capsys.readouterr().out
    assert "warning: blocks.2.mlp has collapsed on 0: no token chose expert 0, 2 of 3" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split", "unseen"], "--split unseen is unknown for Debug28; choose among in, out, all"),
        (["--dataset", "RotatedDigits"], r"takes images of shape (3, 28, 28)"),
        (["--max_images", "0"], "--max_images 0 is too small"),
        (["--compare", "nowhere"], "run `ltdr inspect` on that model first"),
        (["--masks", "nowhere"], "--masks nowhere is no folder"),
        (["--name", "model_step9"], "holds no model"),
    ],
)
def test_bad_input(run, flags, message, capsys):
    assert main([str(run), "--format", "none", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_what_has_no_sparse_layers(tmp_path, capsys):
    assert main([str(finished_run(tmp_path, "ERM_ViT"))]) == 2
    assert "holds ERM_ViT, which has no sparse layers to inspect" in capsys.readouterr().err
    assert main([str(tmp_path / "nothing")]) == 2
    assert "holds no model" in capsys.readouterr().err


def test_masks_become_one_value_per_token(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder / "sketch" / "dog").mkdir(parents=True)
    paths = []
    for name, box in (("a", (0, 0, 20, 10)), ("b", (10, 10, 40, 20))):
        paths.append(str(tmp_path / "images" / "sketch" / "dog" / f"{name}.jpg"))
        mask = Image.new("L", (40, 20), 0)  # two patches of 20 x 10 in each direction
        mask.paste(255, box)
        mask.save(tmp_path / "masks" / "sketch" / "dog" / f"{name}.png")
    network = tiny_moe_vit(preset("ltdr"), img_size=8)  # 2 x 2 patches and a class token
    split = EnvSplit(FileEnvironment("sketch", paths, [0, 0]), np.arange(2), "env0_out")
    masks = ForegroundMasks(tmp_path / "masks", network)
    (both,) = masks.batches(split, 8)
    # a covers the patch above on the left; b half of the one below on the left, which is not
    # more than half, and all of the one below on the right
    assert both.tolist() == [[False, True, False, False, False], [False] * 4 + [True]]
    assert [len(batch) for batch in masks.batches(split, 1)] == [1, 1]
    missing = EnvSplit(FileEnvironment("sketch", [paths[0] + "x"], [0]), np.arange(1), "env0_out")
    (tmp_path / "masks" / "sketch" / "dog" / "a.png").unlink()
    with pytest.raises(UsageError, match="no mask for"):
        next(masks.batches(missing, 1))


def test_tail_tokens_are_compared_with_the_foreground(tmp_path, capsys):
    generator = np.random.RandomState(0)
    for domain in ("photo", "sketch"):
        for label in ("cat", "dog"):
            for folder in ("images", "masks"):
                (tmp_path / folder / domain / label).mkdir(parents=True)
            for number in range(3):
                pixels = generator.randint(0, 255, (16, 16, 3), dtype=np.uint8)
                where = f"{domain}/{label}/{number}.png"
                Image.fromarray(pixels).save(tmp_path / "images" / where)
                mask = np.zeros((16, 16), np.uint8)
                mask[:, :4] = 255  # a quarter: 4 of the 16 patches, of 17 tokens
                Image.fromarray(mask).save(tmp_path / "masks" / where)
    save_model(tiny_moe_vit(preset("ltdr"), num_classes=2), tmp_path / "model")
    flags = ["--dataset", f"folder:{tmp_path / 'images'}", "--masks", str(tmp_path / "masks")]
    flags += ["--split", "all", "--format", "none", "--image_cache", "off", "--num_workers", "0"]
    assert main([str(tmp_path / "model"), *flags]) == 0
    assert f"foreground in blocks.0.mlp: {4 / 17:.1%} of all tokens" in capsys.readouterr().out
    numbers = read_inspection(tmp_path / "model" / "inspect" / "routing.json").total.of(LAYERS[0])
    assert 0 < numbers.tail_foreground_share < 1


def test_models_are_told_apart_by_as_little_as_it_takes():
    def named(path):
        return Inspection(model=path, dataset="", split="", domains=[])

    assert compare_names([named("/a/x"), named("/a/y")]) == ["x", "y"]
    assert compare_names([named("/a/x"), named("/b/x")]) == ["a/x", "b/x"]
