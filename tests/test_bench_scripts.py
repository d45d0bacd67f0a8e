"""The benchmark scripts run, check before they time, and write rows that name their origin."""

import csv
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gmoe_ltdr.experts import StackedExperts
from gmoe_ltdr.kernels import triton_available, triton_interprets
from tests import other_libraries
from tests.test_tutel import needs_tutel

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture
def bench_dispatch(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_dispatch

    yield bench_dispatch
    for path in SCRIPTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


SMALL = ["--images", "2", "--tokens", "5", "--dim", "8", "--hidden-dim", "16", "--rounds", "2"]


def test_rows_say_what_and_where(bench_dispatch, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = [*SMALL, "--plans", "ltdr", "--backends", "blocked", "dense", "--output", str(path)]
    assert bench_dispatch.main(arguments) == 0
    assert bench_dispatch.main(arguments) == 0
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    # the dense network, and each back end with and without router, twice
    assert len(rows) == 2 * (1 + 2 * 2)
    assert rows[0]["backend"] == "ffn"
    assert float(rows[0]["ratio"]) == 1
    assert all(float(row["ms_forward"]) > 0 for row in rows)
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    assert "blocked" in capsys.readouterr().out


def test_a_wrong_back_end_gets_no_time(bench_dispatch, monkeypatch, capsys):
    from gmoe_ltdr import expert_backends

    right = expert_backends.EXPERT_BACKENDS["loop"]
    monkeypatch.setitem(
        expert_backends.EXPERT_BACKENDS, "loop", lambda *arguments: right(*arguments) * 1.01
    )
    arguments = [*SMALL, "--plans", "top2", "--backends", "loop", "--no-csv"]
    assert bench_dispatch.main(arguments) == 1
    out = capsys.readouterr().out
    assert "loop, top2: WRONG" in out
    assert "top2" not in out.split("not timed")[1]


@pytest.mark.parametrize("backend", ["scattermoe", "megablocks"])
def test_other_libraries_are_given_the_same_plan(
    bench_dispatch, monkeypatch, tmp_path, capsys, backend
):
    other_libraries.install(monkeypatch)
    path = tmp_path / "rows.csv"
    arguments = [*SMALL, "--backends", "loop", backend, "--output", str(path)]
    assert bench_dispatch.main(arguments) == 0
    printed = capsys.readouterr().out
    # LTDR's tail tokens have more experts than others
    assert f"{backend}, ltdr: n/a: its plan is k experts for every token, not 2 to 6" in printed
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    timed = [(r["plan"], r["router"]) for r in rows if r["backend"] == backend]
    assert timed == [(plan, router) for plan in ("top1", "top2") for router in ("False", "True")]
    assert all(float(r["error"]) < 1e-5 for r in rows if r["backend"] == backend)
    assert "n/a" not in path.read_text()


def test_other_libraries_are_checked_before_they_are_timed(bench_dispatch, monkeypatch, capsys):
    other_libraries.install(monkeypatch)
    import scattermoe

    right = scattermoe.parallel_linear
    monkeypatch.setattr(
        scattermoe,
        "parallel_linear",
        lambda *a, gates=None, **k: right(*a, gates=gates, **k) * 1.01,
    )
    arguments = [*SMALL, "--plans", "top1", "--backends", "scattermoe", "--no-csv"]
    assert bench_dispatch.main(arguments) == 1
    assert "scattermoe, top1: WRONG" in capsys.readouterr().out


def test_libraries_that_are_not_there_are_left_out(bench_dispatch, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "scattermoe", None)
    arguments = [*SMALL, "--plans", "top1", "--backends", "scattermoe", "loop", "--no-csv"]
    assert bench_dispatch.main(arguments) == 0
    assert "scattermoe, top1: left out" in capsys.readouterr().out


@pytest.mark.tutel
@needs_tutel
def test_the_step_of_gmoe_itself(bench_dispatch, tmp_path):
    import bench_train

    path = tmp_path / "rows.csv"
    arguments = ["--backbone", "vit_dim64_patch4_16", "--batch-size", "2", "--rounds", "1"]
    arguments += ["--models", "gmoe", "--warmup", "0", "--recipe", "--output", str(path)]
    assert bench_train.main(arguments) == 0
    with path.open(newline="") as file:
        *ours, recipe = csv.DictReader(file)
    assert recipe["model"] == "gmoe-recipe"
    assert (recipe["precision"], recipe["backend"]) == ("fp32", "tutel")
    assert float(recipe["over_recipe"]) == 1
    assert all(float(row["over_recipe"]) > 0 for row in ours)


def test_whole_steps(bench_dispatch, tmp_path):
    import bench_train

    path = tmp_path / "rows.csv"
    arguments = ["--backbone", "vit_dim64_patch4_16", "--batch-size", "2", "--rounds", "1"]
    arguments += ["--models", "ltdr-4top2", "--warmup", "0", "--output", str(path)]
    arguments += ["--options", "default", "fused+channels_last"]
    assert bench_train.main(arguments) == 0
    with path.open(newline="") as file:
        dense, _, sparse, with_options = csv.DictReader(file)
    assert dense["model"] == "dense"
    assert [r["options"] for r in (sparse, with_options)] == ["default", "fused+channels_last"]
    assert float(sparse["over_default"]) == 1
    assert 1 < float(sparse["flop_ratio"]) < 4
    assert 2 <= float(sparse["experts_per_token"]) <= 4


def test_routers_are_compared_with_gmoe(bench_dispatch, tmp_path, capsys):
    import bench_routers

    path = tmp_path / "rows.csv"
    small = ["--dataset", "Debug28", "--image_size", "28", "--batch_size", "2", "--rounds", "1"]
    names = ["ERM_ViT", "TASK", "DISTILL"]
    assert bench_routers.main(["--algorithms", *names, *small, "--output", str(path)]) == 0
    with path.open(newline="") as file:
        rows = {row["algorithm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["GMOE", *names]
    assert float(rows["GMOE"]["time"]) == 1
    assert rows["ERM_ViT"]["experts"] == ""
    assert float(rows["TASK"]["experts"]) == 2
    # two sparse layers: five further experts of 64 x 256 each, and what routes to them
    dense = int(rows["ERM_ViT"]["parameters"])
    assert int(rows["ERM_ViT"]["extra"]) == int(rows["DISTILL"]["extra"]) == 0
    experts = 2 * 5 * (2 * 64 * 256 + 64 + 256)
    gate = 2 * (64 * 256 + 256 + 256 * 6 + 1)
    assert int(rows["GMOE"]["parameters"]) == dense + experts + gate


@pytest.mark.skipif(
    find_spec("scattermoe") is None or not triton_available(),
    reason="needs ScatterMoE on the path, and a GPU or TRITON_INTERPRET=1 from the start",
)
def test_the_real_scattermoe_computes_what_our_experts_do(bench_dispatch):
    from other_experts import OTHERS, ids_and_weights

    device = "cpu" if triton_interprets() else "cuda"
    torch.manual_seed(0)
    layer = StackedExperts(4, 32, 64).to(device)
    tokens_TD = torch.randn(50, 32, device=device)
    probs_TE = torch.rand(50, 4, device=device)
    mask_TE = probs_TE >= probs_TE.topk(2).values[:, 1:]
    weights_TE = probs_TE * mask_TE
    cotangent_TD = torch.randn_like(tokens_TD)

    def gradients(compute):
        x_TD = tokens_TD.clone().requires_grad_()
        out_TD = compute(x_TD)
        return [out_TD, *torch.autograd.grad(out_TD, [x_TD, *layer.parameters()], cotangent_TD)]

    def reference(x_TD):
        hidden = torch.einsum("td,efd->tef", x_TD, layer.fc1_weight) + layer.fc1_bias
        out = torch.einsum("tef,edf->ted", layer.act(hidden), layer.fc2_weight) + layer.fc2_bias
        return (out * weights_TE[..., None]).sum(1)

    plan = ids_and_weights(mask_TE, weights_TE, 2)
    found = gradients(lambda x_TD: OTHERS["scattermoe"]()(layer, x_TD, *plan))
    for value, expected in zip(found, gradients(reference), strict=True):
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=1e-4)
