"""`ltdr vlm`: every command on tiny models, and its refusals."""

import functools
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlavaForConditionalGeneration

from gmoe_ltdr import MoESpec
from gmoe_ltdr.vlm import demo, vlm_preset
from gmoe_ltdr.vlm.checkpoint_files import tensor_sizes
from gmoe_ltdr.vlm.cli import build_parser, layer_indices, main
from gmoe_ltdr.vlm.questions import (
    DESCRIPTION,
    IDS,
    KINDS,
    NUMBERS,
    PLACES,
    WORDS,
    make_questions,
)
from gmoe_ltdr.vlm.report import routing_lines, table_lines, told_apart
from gmoe_ltdr.vlm.transformers import (
    LTDRLlavaConfig,
    LTDRLlavaForConditionalGeneration,
    upcycle_llava,
)
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


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    dense_llava().save_pretrained(folder)
    return folder


def refusal(arguments, capsys):
    """The one line that a command says before it ends with status 2."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("preset", "flags", "experts", "top_k", "split"),
    [
        ("ltdr", [], 4, 2, 1),
        ("baseline", ["--top-k", "1"], 4, 1, 1),
        ("gmoe", [], 4, 1, 1),
        ("evomoe", ["--experts", "6"], 6, 1, 1),
        ("dynamic", [], 8, 1, 1),
        ("deepseek_1x1.0+12x0.25", [], 12, 4, 4),
        ("groups_v2Top1-t2Top1", [], 4, 1, 1),
    ],
)
def test_a_preset_keeps_what_no_flag_changes(
    preset, flags, experts, top_k, split, dense_folder, tmp_path
):
    arguments = ["upcycle", str(dense_folder), str(tmp_path / "out"), "--preset", preset, *flags]
    assert main(arguments) == 0
    spec = LTDRLlavaConfig.from_pretrained(tmp_path / "out").spec
    assert (spec.num_experts, spec.top_k, spec.expert_split) == (experts, top_k, split)
    assert spec.block_indices(4) == (0, 2)


def test_flags_may_have_dashes():
    for spelling in ("--vision_tower", "--vision-tower"):
        args = build_parser().parse_args(["convert", "a", "b", spelling, "clip"])
        assert args.vision_tower == "clip"


def test_what_is_sparse_is_not_upcycled(dense_folder, tmp_path, capsys):
    sparse = tmp_path / "sparse"
    assert main(["upcycle", str(dense_folder), str(sparse)]) == 0
    line = refusal(["upcycle", sparse, tmp_path / "out"], capsys)
    assert "model_type 'ltdr_llava' and not 'llava'; it is sparse already: train it" in line
    line = refusal(["upcycle", write_checkpoint(tmp_path / "s"), tmp_path / "out"], capsys)
    assert "use ltdr vlm convert" in line
    loaded = LlavaForConditionalGeneration.from_pretrained(sparse)
    with pytest.raises(ValueError, match="loaded from a sparse LLaVA's folder"):
        upcycle_llava(loaded, vlm_preset("ltdr"))


def test_a_source_is_not_overwritten(dense_folder, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "s")
    before = (source / "config.json").read_text()
    line = refusal(["convert", source, tmp_path / "x" / ".." / "s"], capsys)
    assert "is where the model is read from; write into another folder" in line
    assert (source / "config.json").read_text() == before
    assert "is where" in refusal(["upcycle", dense_folder, dense_folder], capsys)


def cut_off(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def test_a_file_that_was_cut_off_is_named(dense_folder, tmp_path, capsys):
    source, tower = write_checkpoint(tmp_path / "s"), write_tower(tmp_path / "clip")
    out = tmp_path / "out"
    assert main(["upcycle", str(dense_folder), str(out)]) == 0
    for folder in (source, out):
        cut_off(folder)
    line = refusal(["convert", source, tmp_path / "new", "--vision-tower", tower], capsys)
    assert ".safetensors is cut off or damaged (" in line
    assert "out/model.safetensors is cut off or damaged (" in refusal(["inspect", out], capsys)
    dense_llava().save_pretrained(tmp_path / "dense")
    cut_off(tmp_path / "dense")
    line = refusal(["upcycle", tmp_path / "dense", tmp_path / "new"], capsys)
    assert "a weight file is cut off or damaged" in line
    assert not (tmp_path / "new").exists()
    for file in source.glob("*.safetensors"):
        file.unlink()
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no more")
    line = refusal(["convert", source, tmp_path / "new", "--vision-tower", tower], capsys)
    assert "pytorch_model.bin is cut off or damaged" in line


@pytest.mark.parametrize(
    "keys", [("moe", "num_experts"), ("moe", "top_k_experts"), ("vocab_size",)]
)
def test_converting_a_config_that_lacks_something(keys, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "s")
    config = json.loads((source / "config.json").read_text())
    values = config
    for key in keys[:-1]:
        values = values[key]
    del values[keys[-1]]
    (source / "config.json").write_text(json.dumps(config))
    assert f"lacks '{keys[-1]}'" in refusal(["convert", source, tmp_path / "out"], capsys)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([1], "holds a list, and no names and values"),
        ({"model_type": "ltdr_llava"}, "lacks 'moe_spec'"),
        ({"model_type": "ltdr_llava", "moe_spec": {}}, "lacks 'text_config'"),
        ({"model_type": "ltdr_llava", "moe_spec": {}, "text_config": []}, "lacks 'model_type'"),
    ],
)
def test_inspecting_a_config_that_lacks_something(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert message in refusal(["inspect", tmp_path], capsys)


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        ("evomoe", "whose gate is all that router 'dtr' would find"),
        ("dynamic", "whose gate is all that router 'dynamic' would find"),
        ("deepseek_1x1.0+3x1.0", "which has no shared experts"),
        ("groups_v4Top2-t4Top2", "whose experts are whole networks"),
    ],
)
def test_presets_that_take_no_checkpoint(preset, reason, tmp_path, capsys):
    source = write_checkpoint(tmp_path / "s")
    line = refusal(["convert", source, tmp_path / "out", "--preset", preset], capsys)
    assert f"preset '{preset}' cannot take a MoE-LLaVA checkpoint, {reason}" in line
    able = line.rpartition("; ")[2].partition(" can, or make")[0].split(", ")
    assert {"baseline", "ltdr", "gmoe", "groups_v2Top1-t2Top1"} <= set(able)
    assert preset not in able
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["dynamic", "ltdr_expert_choice"])
def test_inspect_counts_no_experts_per_token_where_none_is_given(
    preset, dense_folder, tmp_path, capsys
):
    out = str(tmp_path / "out")
    assert main(["upcycle", str(dense_folder), out, "--preset", preset]) == 0
    capsys.readouterr()
    assert main(["inspect", out]) == 0
    printed = capsys.readouterr().out
    assert "how many a token uses, its router decides" in printed
    assert "top-" not in printed


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
        (["upcycle", "nowhere", "out"], "nowhere holds no readable config.json"),
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
    assert "the seeds of one variant up to" in printed
    for variant in ("dense", "top-2", "LTDR"):
        assert f"\n{variant}" in printed
    assert "vision" in printed
    assert "language" in printed
    assert "(# head, + tail)" in printed
    model = LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path / "d" / "model")
    assert isinstance(model.config.spec, MoESpec)
    assert (tmp_path / "d" / "routing_ltdr.json").is_file()


def test_what_is_said_of_a_spread_is_what_was_measured():
    close = {"dense": [0.90, 0.94], "LTDR": [0.93, 0.93]}  # means .92 and .93
    assert told_apart(close) == (
        "The variants' means lie up to 0.010 apart, the seeds of one variant up to 0.040: so these "
        "are not told apart here."
    )
    far = {"dense": [0.50, 0.51], "LTDR": [0.90, 0.92], "top-2": [0.7, 0.7]}
    assert told_apart(far) == (
        "The variants' means lie up to 0.405 apart, the seeds of one variant up to 0.020: so seeds "
        "alone do less."
    )
    assert "up to 0.300 apart; one seed shows no spread" in told_apart({"a": [0.6], "b": [0.9]})


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
