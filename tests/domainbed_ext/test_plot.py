"""Learning curves: the frame, the figure, the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from sweep_records import make_record, write_sweep

from domainbed_ext.learning_curves import CURVE_COLUMNS, chosen_draws, curves_frame
from domainbed_ext.scripts import plot
from domainbed_ext.selection import split_accs
from domainbed_ext.table_names import UPSTREAM_ENVIRONMENTS

pytest.importorskip("matplotlib", reason="drawing needs the extra [plots]")


def curve(test_envs=(0,), *, accs, losses=None, algorithm="LTDR", **changes):
    """One run of Debug28 with a record every 10 steps; accs: on all splits of all domains."""
    losses = losses or [1.0] * len(accs)
    return [
        make_record(
            test_envs,
            step=10 * index,
            in_acc=[acc] * 3,
            out_acc=[acc - 0.1] * 3,
            loss=loss,
            algorithm=algorithm,
            **changes,
        )
        for index, (acc, loss) in enumerate(zip(accs, losses, strict=True))
    ]


def _values(frame, metric, **where):
    frame = frame[frame["metric"] == metric]
    for column, value in where.items():
        frame = frame[frame[column] == value]
    return dict(zip(frame["step"], frame["value"], strict=True))


def test_a_record_has_three_accuracies():
    record = make_record([1], in_acc=[0.9, 0.4, 0.7], out_acc=[0.6, 0.5, 0.5])
    # Training domains 0 and 2: (0.9 + 0.7) / 2 and (0.6 + 0.5) / 2; the test domain's "in".
    assert split_accs(record) == pytest.approx({"in": 0.8, "out": 0.55, "test": 0.4})
    record["env1_unseen_acc"] = 0.3
    assert split_accs(record)["test"] == 0.3
    record = make_record([], in_acc=[0.9, 0.4, 0.8], out_acc=[0.3, 0.6, 0.6])
    assert split_accs(record) == pytest.approx({"in": 0.7, "out": 0.5})
    assert split_accs(make_record([1, 2], in_acc=[1, 0.2, 0.4], out_acc=[0] * 3)) == pytest.approx(
        {"in": 1, "out": 0, "test": 0.3}
    )


def test_curves_by_hand():
    frame = curves_frame(curve(accs=[0.2, 0.6], losses=[2.0, 0.5]))
    assert tuple(frame.columns) == CURVE_COLUMNS
    assert _values(frame, "test") == pytest.approx({0: 20, 10: 60})
    assert _values(frame, "out") == pytest.approx({0: 10, 10: 50})
    assert _values(frame, "env2_out_acc") == pytest.approx({0: 10, 10: 50})
    assert _values(frame, "loss") == {0: 2.0, 10: 0.5}
    assert set(frame["test_envs"]) == {(0,)}
    assert "step" not in set(frame["metric"])


def test_of_several_draws_the_selected_one_is_shown():
    records = [
        *curve(accs=[0.3, 0.8], hparams_seed=0),
        *curve(accs=[0.9, 0.2], hparams_seed=1),  # best at its first step
        *curve(accs=[0.5, 0.5], hparams_seed=0, trial_seed=1),
        *curve(accs=[0.1, 0.5], hparams_seed=1, trial_seed=1),  # a tie: the higher seed
    ]
    chosen = chosen_draws(curves_frame(records))
    assert _values(chosen, "test", trial_seed=0) == pytest.approx({0: 90, 10: 20})
    assert _values(chosen, "test", trial_seed=1) == pytest.approx({0: 10, 10: 50})


def figure_of(records, *, metrics=("test",)):
    from domainbed_ext.curve_figure import curve_figure

    curves = curves_frame(records)
    return curve_figure(
        curves,
        metrics=metrics,
        domain_names=UPSTREAM_ENVIRONMENTS,
        algorithms=list(dict.fromkeys(curves["algorithm"])),
    )


def test_lines_are_means_and_bands_reach_from_lowest_to_highest():
    records = [
        record
        for trial, accs in enumerate([[0.2, 0.6], [0.3, 0.5], [0.4, 0.4]])
        for record in curve(accs=accs, trial_seed=trial)
    ]
    figure = figure_of([*records, *curve(accs=[0.1, 0.2], algorithm="ERM_ViT")])
    (panel,) = figure.axes
    mean, alone = panel.lines
    assert mean.get_xdata().tolist() == [0, 10]
    assert mean.get_ydata() == pytest.approx([30, 50])
    assert alone.get_ydata() == pytest.approx([10, 20])
    (band,) = panel.collections  # none around a single trial
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.round(6).tolist()}
    assert corners == {(0, 20), (0, 40), (10, 40), (10, 60)}
    (legend,) = figure.legends
    assert legend.get_title().get_text().startswith("mean over 1 to 3 trials, band from the lowest")
    assert mean.get_color() != alone.get_color()
    assert mean.get_linestyle() != alone.get_linestyle()


def test_a_mean_ends_where_the_first_trial_ends():
    records = [*curve(accs=[0.2, 0.4, 0.6]), *curve(accs=[0.4, 0.6], trial_seed=1)]
    (line,) = figure_of(records).axes[0].lines
    assert line.get_xdata().tolist() == [0, 10]
    assert line.get_ydata() == pytest.approx([30, 50])


def test_panels_are_labelled_and_the_legend_is_off_the_data():
    records = [
        *curve((1,), accs=[0.2, 0.6]),
        *curve((0,), accs=[0.2, 0.6]),
        *curve((), accs=[0.2, 0.6]),
        *curve((0,), accs=[0.2, 0.6], algorithm="a rather long name of an algorithm"),
    ]
    figure = figure_of(records, metrics=("in", "test", "loss"))
    figure.draw_without_rendering()
    rows = [part.get_suptitle() for part in figure.subfigs]
    assert rows == [
        "Debug28, test domain 0",
        "Debug28, test domain 1",
        "Debug28, all domains trained",
    ]
    assert len(figure.axes) == 9
    for panel in figure.axes[:6]:
        assert panel.get_xlabel() == "training step"
        assert panel.get_ylabel() in ("accuracy (%)", "loss")
        assert panel.get_title()
    assert [text.get_text() for text in figure.axes[7].texts] == ["not recorded"]
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(panel.get_tightbbox()) for panel in figure.axes)
    assert box.x1 <= figure.bbox.x1


def test_many_algorithms_stay_apart():
    records = [r for n in range(20) for r in curve(accs=[0.1, 0.2], algorithm=f"A{n}")]
    lines = figure_of(records).axes[0].lines
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 20


@pytest.fixture
def sweep(tmp_path):
    records = [
        record
        for algorithm in ("ERM_ViT", "LTDR")
        for envs in ([0], [1], [0, 1])
        for record in curve(envs, accs=[0.2, 0.6], algorithm=algorithm)
    ]
    return write_sweep(tmp_path / "sweep", records)


MAGIC = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize(("ending", "magic"), MAGIC.items())
def test_the_ending_chooses_the_format(sweep, tmp_path, capsys, ending, magic):
    files = [tmp_path / "new" / f"{name}.{ending}" for name in "ab"]
    for file in files:
        assert plot.main([str(sweep), "--metric", "test", "--output", str(file)]) == 0
        assert capsys.readouterr().out == f"{file}\n"
    first, second = (file.read_bytes() for file in files)
    assert first.startswith(magic)
    assert first == second


def test_a_single_run_without_a_display_or_pyplot(sweep):
    run = next(path for path in sorted(sweep.iterdir()) if path.is_dir())
    code = (
        "import sys; from domainbed_ext.scripts.plot import main;"
        f"print(main([{str(run)!r}, '--metric', 'out', 'loss']));"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    picture = run / "learning_curves.png"
    assert done.stdout.splitlines() == [str(picture), "0", "False False"], done.stderr
    assert picture.read_bytes().startswith(MAGIC["png"])


def _drawn(monkeypatch, *flags):
    seen = {}

    def curve_figure(curves, **options):
        seen.update(curves=curves, **options)

    monkeypatch.setattr(plot, "curve_figure", curve_figure)
    monkeypatch.setattr(plot, "save_figure", lambda figure, path: None)
    assert plot.main([str(flag) for flag in flags]) == 0
    return seen


def test_filters(sweep, monkeypatch):
    everything = _drawn(monkeypatch, sweep)
    # Pairs of test domains serve leave-one-domain-out and are not drawn.
    assert set(everything["curves"]["test_envs"]) == {(0,), (1,)}
    assert everything["algorithms"] == ["ERM_ViT", "LTDR"]
    assert everything["metrics"] == ["in", "out", "test", "loss"]
    some = _drawn(monkeypatch, sweep, "--test_envs", 1, "--algorithms", "LTDR", "--metric", "test")
    assert set(some["curves"]["test_envs"]) == {(1,)}
    assert some["algorithms"] == ["LTDR"]
    assert some["metrics"] == ["test"]


def test_the_same_jobs_of_two_sweeps_are_told_apart_by_folder(sweep, tmp_path, monkeypatch):
    other = write_sweep(tmp_path / "other", curve((0,), accs=[0.3, 0.7]))
    drawn = _drawn(monkeypatch, sweep, other, "--test_envs", 0)
    assert drawn["algorithms"] == ["ERM_ViT", f"LTDR ({sweep})", f"LTDR ({other})"]
    values = _values(drawn["curves"], "test", algorithm=f"LTDR ({other})")
    assert values == pytest.approx({0: 30, 10: 70})
    assert _drawn(monkeypatch, sweep, other, "--algorithms", "LTDR")["algorithms"] == [
        f"LTDR ({sweep})",
        f"LTDR ({other})",
    ]
    twice = _drawn(monkeypatch, sweep, sweep / ".." / "sweep")  # the same folder
    assert twice["algorithms"] == ["ERM_ViT", "LTDR"]


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--output", "x.jpg"], "--output x.jpg does not say which kind of file; end it in .png, "),
        (["--metric", "loos"], "--metric loos is in no record; choose among in, out, test, env0_"),
        (["--test_envs", "2"], "--test_envs 2 leaves no run to draw; there are 0, 0 1, 1"),
        (["--datasets", "PACS"], "--datasets PACS leaves no run to draw; there are Debug28"),
        (["--algorithms", "X"], "--algorithms X leaves no run to draw; there are ERM_ViT, LTDR"),
        (["--hparams_seed", "3"], "--hparams_seed 3 leaves no run to draw; there are 0"),
    ],
)
def test_bad_input_ends_in_one_line(sweep, capsys, flags, error):
    assert plot.main([str(sweep), *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_flags_are_frozen():
    """Removing or renaming one breaks scripts: it takes a forwarding shim."""
    assert {action.dest for action in plot.build_parser()._actions} == {
        *("help", "folders", "output", "metric"),
        *("test_envs", "datasets", "algorithms", "hparams_seed"),
    }


def test_folders_without_records_end_in_one_line(tmp_path, capsys):
    assert plot.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: no record in {tmp_path}; give the --output")
    assert plot.main([str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_said(sweep, tmp_path, capsys):
    (tmp_path / "x.png").mkdir()
    assert plot.main([str(sweep), "--metric", "out", "--output", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'x.png'}: Is a dir")


def test_without_matplotlib_the_extra_is_named(sweep, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot.main([str(sweep), "--output", str(Path("x.png"))]) == 2
    assert "install the extra: pip install 'gmoe-ltdr[plots]'" in capsys.readouterr().err
