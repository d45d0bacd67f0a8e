"""`ltdr vlm`: every command on tiny models, and its refusals."""

import functools
import json

import pytest
import torch

pytest.importorskip("transformers")

from gmoe_ltdr import MoESpec
from gmoe_ltdr.vlm import demo
from gmoe_ltdr.vlm.checkpoint_files import tensor_sizes
from gmoe_ltdr.vlm.cli import layer_indices, main
from gmoe_ltdr.vlm.questions import (
    DESCRIPTION,
    IDS,
    KINDS,
    NUMBERS,
    PLACES,
    WORDS,
    make_questions,
)
from gmoe_ltdr.vlm.report import routing_lines, table_lines
from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration
from tests.vlm.goldens import write_checkpoint, write_tower
from tests.vlm.llavas import dense_llava


def test_convert_and_inspect(tmp_path, capsys):
    source, tower = write_checkpoint(tmp_path / "s"), write_tower(tmp_path / "clip")
    out = str(tmp_path / "out")
    arguments = ["convert", str(source), out, "--vision_tower", str(tower)]
    assert main([*arguments, "--preset", "ltdr", "--verify"]) == 0
    printed = capsys.readouterr().out
    assert "train it further" in printed
    assert "verified: 2 sparse layers" in printed
    assert main(["inspect", out]) == 0
    printed = capsys.readouterr().out
    assert "sparse layers 0 2\n" in printed
    assert "4 experts, top-2" in printed
    assert "tail tokens   4 experts" in printed
    total = sum(tensor_sizes(tmp_path / "out").values())
    # two sparse layers of four experts of three matrices, half of which a token uses
    assert f"{total:,}; {total - 2 * 2 * 3 * 64 * 128:,} used" in printed


def test_upcycle(tmp_path, capsys):
    dense_llava().save_pretrained(tmp_path / "dense")
    arguments = ["upcycle", str(tmp_path / "dense"), str(tmp_path / "out"), "--experts", "3"]
    assert main([*arguments, "--layers", "second_half", "--preset", "baseline"]) == 0
    model = LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    spec = model.config.spec
    assert (spec.layers, spec.num_experts, spec.activates_tail) == ((2, 3), 3, False)
    assert main([*arguments, "--layers", "first"]) == 2
    assert "give one of sparse, first_half" in capsys.readouterr().err


def test_names_of_layers():
    assert layer_indices(["sparse"], 5) == (0, 2, 4)
    assert layer_indices(["first_half"], 5) == (0, 1)
    assert layer_indices(["second_half"], 5) == (2, 3, 4)
    assert layer_indices(["dense"], 3) == (0, 1, 2)
    assert layer_indices(["1", "-1"], 4) == (1, -1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "nowhere"], "no readable config.json"),
        (["convert", "nowhere", "out"], "no readable config.json"),
        (["upcycle", "nowhere", "out"], "nowhere holds no config.json"),
        (["demo", "--steps", "1"], "at least 3 steps"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("kind", "remedy"), [("llava", "ltdr vlm upcycle"), ("moe_llava_phi", "ltdr vlm convert")]
)
def test_inspecting_what_is_not_sparse_yet(kind, remedy, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert main(["inspect", str(tmp_path)]) == 2
    assert remedy in capsys.readouterr().err


def colors_in(picture):
    """Names of the colours of a picture, read off its pixels."""
    from gmoe_ltdr.vlm.questions import COLORS

    pixels = ((picture + 1) * 127.5).round().flatten(1).T
    return {
        name
        for name, rgb in COLORS.items()
        if (pixels - torch.tensor(rgb)).abs().amax(-1).lt(2).sum() > 8
    }


def color_at(picture, top, left):
    """The colour of the thing in one cell, read off its pixels; None if it is empty."""
    rows = slice(0, 16) if top == "top" else slice(16, 32)
    columns = slice(0, 16) if left == "left" else slice(16, 32)
    found = colors_in(picture[:, rows, columns])
    assert len(found) < 2
    return found.pop() if found else None


def test_answers_are_in_the_picture():
    """Colours, numbers and places, by looking at the pixels."""
    questions = make_questions(200, 3)
    again = make_questions(200, 3)
    assert torch.equal(questions.input_ids, again.input_ids)
    assert not torch.equal(questions.input_ids, make_questions(200, 4).input_ids)
    seen = set()
    for row in range(200):
        place, kind = int(questions.answer_place[row]), KINDS[questions.kind[row]]
        answer = WORDS[questions.input_ids[row, place]]
        labelled = questions.labels[row] != -100
        assert labelled.nonzero().flatten().tolist() == [place, place + 1]
        words = [WORDS[i] for i in questions.input_ids[row, :place].tolist()]
        picture = questions.pixel_values[row]
        colors = colors_in(picture)
        if kind == "color":
            assert answer == color_at(picture, *words[-4:-2])
        if kind == "number":
            assert NUMBERS.index(answer) == len(colors) - 1
        if kind == "yes or no":
            assert (words[words.index("a") + 1] in colors) == (answer == "yes")
        if kind == "shape":
            assert color_at(picture, *words[-4:-2]) is not None
            assert answer in ("circle", "square", "triangle", "cross")
        seen.add((kind, answer))
    assert len(seen) == 5 + 4 + 4 + 2
    assert int((questions.input_ids[0] == IDS["<image>"]).sum()) == 16


def test_descriptions_go_cell_by_cell():
    questions = make_questions(40, 5, descriptions=0.5)
    described = questions.kind == DESCRIPTION
    assert 8 < int(described.sum()) < 32
    for row in described.nonzero().flatten().tolist():
        place = int(questions.answer_place[row])
        assert (questions.labels[row] != -100).nonzero().flatten().tolist() == list(
            range(place, place + 9)
        )
        told = [WORDS[i] for i in questions.labels[row, place : place + 8].tolist()]
        for cell, where in enumerate(PLACES):
            found = color_at(questions.pixel_values[row], *where)
            assert told[2 * cell] == (found or "no")
            assert (told[2 * cell + 1] == "thing") == (found is None)


def test_the_demo_from_start_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "run_demo", functools.partial(demo.run_demo, num_test=40))
    assert main(["demo", "--steps", "3", "--seeds", "2", "--folder", str(tmp_path / "d")]) == 0
    printed = capsys.readouterr().out
    assert "right answers" in printed
    assert "not told apart here" in printed
    for variant in ("dense", "top-2", "LTDR"):
        assert f"\n{variant}" in printed
    assert "vision" in printed
    assert "language" in printed
    assert "(# head, + tail)" in printed
    model = LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path / "d" / "model")
    assert isinstance(model.config.spec, MoESpec)
    assert (tmp_path / "d" / "routing_ltdr.json").is_file()


def test_lines_of_text():
    assert list(table_lines(["a", "bb"], [["ccc", "d"]])) == ["a    bb", "ccc   d"]
    from gmoe_ltdr.stats import RoutingStats
    from tests.oracle import plan

    stats = RoutingStats(detailed=True)
    mask = torch.tensor([[True, True], [True, False]])
    stats.add({"layers.0.mlp": plan(mask, logits_TE=torch.tensor([[2.0, 0.0], [0.0, 0.0]]))})
    lines = list(routing_lines(stats, title="here"))
    assert lines[0] == "here"
    assert "vision" in lines[2]
    assert lines[2].split()[2] == "1.50"  # three choices of two tokens
    assert len(lines) == 6  # a title, a header, a layer, and a histogram of two bins


@pytest.mark.slow
def test_a_small_model_learns_and_its_sparse_variants_keep_up():
    start, results = demo.run_demo(steps=900, seeds=(0,), num_test=2000)
    assert start > 0.7
    assert results["dense"].mean > 0.9
    for result in results.values():  # seeds of one variant are 3 points apart
        assert result.mean > results["dense"].mean - 0.05
