"""Which jobs a sweep consists of."""

from __future__ import annotations

import pytest

from domainbed_ext.errors import UsageError
from domainbed_ext.plan import make_jobs, pruning_words
from domainbed_ext.sweep_flags import build_parser
from tests.short_sweeps import ONE_EACH, plan
from tests.upstream_checkout import ask_upstream, needs_upstream

TWO_DRAWS = "--algorithms LTDR --n_hparams 2 --n_trials 3".split()


def test_jobs_are_domainbeds():
    jobs = plan("--algorithms", "LTDR", "--datasets", "Debug28", "--n_hparams", "2")
    assert len(jobs) == 3 * 2 * 6  # trials, draws, three domains alone and three pairs
    envs = [list(job.args.test_envs) for job in jobs[:12:2]]
    assert envs == [[0], [0, 1], [0, 2], [1], [1, 2], [2]]
    assert jobs[0].args.seed == 1254117012  # as DomainBed b93c22a has it
    assert len({job.output_dir for job in jobs}) == len(jobs)


@needs_upstream
@pytest.mark.upstream
@pytest.mark.parametrize(
    "flags",
    [
        ["--datasets", "Debug28", "PACS", "--algorithms", "ERM", "--n_hparams", "2"],
        ["--datasets", "VLCS", "--algorithms", "ERM", "LTDR", "--single_test_envs", "--steps", "5"],
        ["--datasets", "PACS", "--n_hparams_from", "1", "--hparams", '{"lr": 1}', *ONE_EACH[2:]],
    ],
)
def test_jobs_are_those_of_a_real_domainbed(flags):
    args = build_parser().parse_args([*flags, "--data_dir", "/data"])
    code = (
        "import hashlib\n"
        "from domainbed.scripts.sweep import Job, make_args_list\n"
        "jobs = [Job(a, 'sweep') for a in make_args_list(**question)]\n"
        "print(json.dumps([job.output_dir for job in jobs]))"
    )
    names = (
        "n_trials algorithms n_hparams_from n_hparams steps data_dir task holdout_fraction "
        "single_test_envs hparams"
    ).split()
    question = {name: getattr(args, name) for name in names}
    expected = ask_upstream(code, {**question, "dataset_names": args.datasets})
    args.output_dir = "sweep"
    assert [str(job.output_dir) for job in make_jobs(args)] == expected


def test_only_jobs_on_given_test_environments():
    flags = ["--algorithms", "LTDR", "--datasets", "Debug28", *ONE_EACH[:4]]
    assert _envs(plan(*flags, "--test_envs", "1")) == [[0, 1], [1], [1, 2]]
    assert _envs(plan(*flags, "--test_envs", "0", "2", "--single_test_envs")) == [[0], [2]]
    with pytest.raises(UsageError, match="out of range for Debug28; it has domains 0 to 2"):
        plan(*flags, "--test_envs", "3")


@pytest.mark.parametrize(
    ("selection", "pairs"),
    [
        (["training-domain"], False),
        (["oracle"], False),
        (["iid", "oracle"], False),
        (["leave-one-out"], True),
        (["leave-one-domain-out"], True),
        (["training-domain", "loo"], True),
        (["training-domain validation set"], False),
    ],
)
def test_a_sweep_for_some_selection_methods_has_the_jobs_they_need(selection, pairs):
    flags = [*TWO_DRAWS, "--datasets", "PACS"]
    every, alone = plan(*flags), plan(*flags, "--single_test_envs")
    jobs = plan(*flags, "--selection", *selection)
    # The same names, so that a sweep can be widened later.
    expected = every if pairs else alone
    assert [job.output_dir for job in jobs] == [job.output_dir for job in expected]
    assert {job.args.eval_splits for job in jobs} == {"needed"}
    assert {job.args.eval_splits for job in every} == {"all"}
    widened = plan(*flags, "--selection", *selection, "--eval_splits", "all")
    assert {job.args.eval_splits for job in widened} == {"all"}
    assert [job.output_dir for job in widened] == [job.output_dir for job in jobs]


def test_trials_that_share_their_draws_are_other_jobs():
    flags = [*TWO_DRAWS, "--datasets", "Debug28", "--test_envs", "0", "--single_test_envs"]
    drawn, shared = plan(*flags), plan(*flags, "--hparams_per_trial", "shared")
    for one, other in zip(drawn, shared, strict=True):
        assert one.args.seed == other.args.seed
        # Draw 0 is the defaults, in either case the same.
        assert (one.output_dir == other.output_dir) is (one.args.hparams_seed == 0)
    assert {job.args.hparams_per_trial for job in shared} == {"drawn", "shared"}
    assert {job.args.hparams_per_trial for job in drawn} == {"drawn"}


def test_a_selection_method_on_some_domains_has_the_jobs_it_needs():
    flags = ["--algorithms", "LTDR", "--datasets", "PACS", *ONE_EACH[:4], "--test_envs", "2"]
    assert _envs(plan(*flags, "--selection", "oracle")) == [[2]]
    envs = _envs(plan(*flags, "--selection", "leave-one-out"))
    assert envs == [[0, 2], [1, 2], [2], [2, 3]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (
            ["--selection", "training-domain"],
            [
                "pairs of test domains are not needed for training-domain validation set: 24 jobs "
                "instead of 60",
                "images that are trained on are not evaluated, no selection method needs them "
                "(--eval_splits all does)",
            ],
        ),
        (["--selection", "loo"], ["images that are trained on are not evaluated"]),
        (["--selection", "loo", "--eval_splits", "all"], []),
        (["--selection", "oracle", "--single_test_envs", "--eval_splits", "all"], []),
        (["--eval_splits", "needed"], []),
        ([], []),
    ],
)
def test_the_plan_says_what_a_selection_method_saves(flags, expected):
    args = build_parser().parse_args([*TWO_DRAWS, "--datasets", "PACS", *flags])
    lines = pruning_words(args, len(make_jobs(args)))
    assert len(lines) == len(expected)
    for line, start in zip(lines, expected, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    ("dataset", "flags", "expected"),
    [
        ("EmojiDG", [], True),
        ("EmojiDG6", [], True),
        ("EmojiDG", ["--no-ceiling"], False),
        ("Debug28", [], False),
        ("Debug28", ["--ceiling"], True),
    ],
)
def test_ceiling_jobs_hold_out_nothing(dataset, flags, expected):
    envs = _envs(plan("--datasets", dataset, "--algorithms", "LTDR", *ONE_EACH, *flags))
    assert ([] in envs) is expected


def _envs(jobs):
    return [list(job.args.test_envs) for job in jobs]
