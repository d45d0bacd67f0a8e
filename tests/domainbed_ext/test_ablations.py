"""Every row of LTDR's ablations (v1's tables 3 and 7, what v2 adds): how it is asked for, with text
in the library and without it on DomainBed, and that this is what the row says."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from domainbed_ext.algorithms import get_algorithm_class
from domainbed_ext.errors import UsageError
from domainbed_ext.hparams import default_hparams, validate_hparams
from gmoe_ltdr import MoESpec, TailRule, preset
from gmoe_ltdr.routing import Modality

DOCS = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
ALL, TEXT, VISION = {"vision", "language"}, {"language"}, {"vision"}
NONE: set[str] = set()


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: In the paper.
        spec: With text.
        balanced: Whose tokens are balanced then.
        extra: Which tokens get more experts: "vision", "language" or "none".
        algorithm, hparams: On DomainBed; the algorithm is None where text is needed.
        refused: The hparams of LTDR that ask for it nevertheless.
        further: What else a row fixes, as fields of both specs.
    """

    name: str
    spec: MoESpec
    balanced: set[str]
    extra: str
    algorithm: str | None
    hparams: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)


def tail(**changes) -> dict[str, Any]:
    return {"tail_rule": TailRule(**changes)}


def options(**values) -> dict[str, Any]:
    return {"router_options": values}


# GMoE with the paper's two experts a token and without drops: DomainBed's baseline
GMOE_2 = {"moe_top_k": 2, "moe_capacity_factor": 0.0}
NO_EEA = {"ltdr_tail_top_k": 2}

ROWS = [
    # table 3: its minus rows are relative to the baseline (routing specification, 2.7)
    Row("baseline", preset("baseline"), ALL, "none", "GMOE", GMOE_2),
    Row("+DAR", preset("dar"), TEXT, "none", "GMOE_DAR"),
    Row("+EEA", preset("eea"), ALL, "vision", "GMOE_EEA"),
    Row("LTDR", preset("ltdr"), TEXT, "vision", "LTDR"),
    Row(
        "-LLB",
        preset("no_language_balance"),
        VISION,
        "none",
        None,
        refused={"ltdr_balance": "vision"},
    ),
    Row("-ALB", preset("no_balance"), NONE, "none", "GMOE_DAR", refused={"ltdr_balance": "none"}),
    # table 7
    Row("VTT", preset("ltdr"), TEXT, "vision", "LTDR", {"ltdr_selection": "vtt"}),
    Row(
        "VHT",
        preset("ltdr", **tail(select="head")),
        TEXT,
        "vision",
        "LTDR",
        {"ltdr_selection": "vht"},
        further=tail(select="head"),
    ),
    Row(
        "IAT",
        preset("ltdr", **tail(kind="attention")),
        TEXT,
        "vision",
        "LTDR",
        {"ltdr_selection": "iat"},
        refused={"ltdr_selection": "iat_instruction"},
        further=tail(kind="attention", value=0.15),
    ),
    # v2, table VIII
    *(
        Row(
            f"fixed {share:.0%}",
            preset("ltdr", **tail(kind="quantile", value=share)),
            TEXT,
            "vision",
            "LTDR",
            {"ltdr_selection": "vtt_fixed", "ltdr_selection_fraction": share},
            further=tail(kind="quantile", value=share),
        )
        for share in (0.1, 0.15, 0.2)
    ),
    # v2, table XX
    Row(
        "tuned threshold",
        preset("ltdr", **tail(kind="learned")),
        TEXT,
        "vision",
        "LTDR",
        {"ltdr_selection": "vtt_learned"},
        further=tail(kind="learned"),
    ),
    # v2, table VI
    Row("Modality", preset("groups_v2Top1-t2Top1"), ALL, "none", "GROUPS", further={"top_k": 1}),
    Row(
        "Distribution",
        preset("no_balance", router="distribution", num_experts=4),
        NONE,
        "none",
        "DISTRIBUTION",
        {"moe_num_experts": 4},
        further={"router": "distribution", "num_experts": 4, "top_k": 2},
    ),
    # v2, table XVI
    Row(
        "language + MsDaR",
        preset("no_language_balance"),
        VISION,
        "none",
        None,
        refused={"ltdr_balance": "vision"},
    ),
    Row(
        "language + MsDaR + TsDEA",
        preset("swapped"),
        VISION,
        "language",
        None,
        refused={"ltdr_selection": "language"},
    ),
    # v2, table XVII
    Row("Top-1", preset("baseline", top_k=1), ALL, "none", "GMOE", {"moe_capacity_factor": 0.0}),
    Row("LTDR + Top-1", preset("dar", top_k=1), TEXT, "none", "GMOE_DAR", {"moe_top_k": 1}),
    Row(
        "LTDR + Dynamic",
        preset("ltdr_expert_choice"),
        TEXT,
        "none",
        "LTDR",
        {"ltdr_selection": "expert_choice"},
        further={"router": "expert_choice"},
    ),
    Row("LTDR + Top-a", preset("ltdr_v2_literal"), TEXT, "vision", "LTDR", {"ltdr_tail_top_k": 4}),
    # v2, table XVIII
    Row(
        "reduced balance",
        preset("reduced_balance"),
        ALL,
        "none",
        "LTDR",
        {"ltdr_balance": "reduced", **NO_EEA},
        refused={"ltdr_balance": "all"},
        further=options(balance_weights={"vision": 0.001, "language": 0.01}),
    ),
    # v2, table VII: without LTDR's modules
    *(
        Row(
            f"sharpening by {kind}",
            preset("baseline", **options(sharpening=kind)),
            ALL,
            "none",
            "GMOE_EEA",
            {"ltdr_sharpening": kind, **NO_EEA},
            further=options(sharpening=kind),
        )
        for kind in ("temperature", "entropy", "variance")
    ),
    # v2: a model of 64 experts, eight a token
    Row(
        "64 experts, top-8, a = 12",
        preset("ltdr_v2_literal", num_experts=64, top_k=8),
        TEXT,
        "vision",
        "LTDR",
        {"moe_num_experts": 64, "moe_top_k": 8, "ltdr_tail_top_k": 12},
        further={"num_experts": 64, "top_k": 8, "tail_top_k": 12},
    ),
    # what MoE-LLaVA's DeepSpeed does
    Row(
        "second expert drawn",
        preset("ltdr", **options(second_expert="gumbel")),
        TEXT,
        "vision",
        "LTDR",
        {"ltdr_second_expert": "gumbel"},
        further=options(second_expert="gumbel"),
    ),
]


def spec_of(row: Row) -> MoESpec:
    """What its algorithm and hparams make."""
    changes = validate_hparams(row.hparams, row.algorithm, "Debug28")
    hparams = {**default_hparams(row.algorithm, "Debug28"), **changes}
    return get_algorithm_class(row.algorithm)((3, 28, 28), 2, 2, hparams).spec


def extra_of(spec: MoESpec) -> str:
    return spec.tail_rule.modality if spec.activates_tail else "none"


def balanced_of(spec: MoESpec) -> set[str]:
    if spec.balance == "none":
        return set()
    weights = spec.router_options.get("balance_weights")
    return set(weights) if weights else {m.name.lower() for m in spec.balanced_modalities}


def assert_says(spec: MoESpec, further: dict[str, Any]) -> None:
    for name, value in further.items():
        found = getattr(spec, name)
        if isinstance(value, TailRule):
            assert (found.kind, found.select, found.share) == (
                value.kind,
                value.select,
                value.share,
            )
        elif isinstance(value, dict):
            assert value.items() <= dict(found).items()
        else:
            assert found == value


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_with_text(row):
    assert balanced_of(row.spec) == row.balanced
    assert extra_of(row.spec) == row.extra
    assert_says(row.spec, row.further)
    assert MoESpec.from_json(row.spec.to_json()) == row.spec


@pytest.mark.parametrize("row", [r for r in ROWS if r.algorithm], ids=lambda row: row.name)
def test_on_domainbed(row):
    """Without text, balancing text is balancing nothing."""
    spec = spec_of(row)
    assert balanced_of(spec) - {"language"} == row.balanced - {"language"}
    assert extra_of(spec) == row.extra
    assert_says(spec, row.further)
    assert spec.capacity_factor is None


@pytest.mark.parametrize("row", [r for r in ROWS if r.refused], ids=lambda row: row.name)
def test_what_needs_text_is_refused_without_it(row):
    ((name, value),) = row.refused.items()
    with pytest.raises(UsageError, match=f"^hparam {name}={value!r} .*(text|GMOE_EEA)"):
        validate_hparams(row.refused, "LTDR", "PACS")
    if row.algorithm is None:
        assert Modality.LANGUAGE not in row.spec.balanced_modalities  # vision, where text is spared


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_docs_say_how(row):
    line = next(line for line in DOCS.splitlines() if line.startswith(f"| {row.name} |"))
    written = re.findall(r"`([^`]*)`", line)
    if row.algorithm is None:
        assert "needs text" in line
        return
    assert row.algorithm in written
    (found,) = [json.loads(text) for text in written if text.startswith("{")] or [{}]
    assert found == row.hparams or row.name in ("LTDR", "VTT")


def test_the_draw_of_a_second_expert_needs_two():
    with pytest.raises(UsageError, match="chooses the second of two experts, but top_k=1"):
        spec_of(
            Row(
                "",
                preset("ltdr"),
                TEXT,
                "",
                "LTDR",
                {"ltdr_second_expert": "gumbel", "moe_top_k": 1},
            )
        )
    with pytest.raises(UsageError, match=r"sharpening_strength'\]=2\.0 needs 'shar"):
        spec_of(Row("", preset("ltdr"), TEXT, "", "LTDR", {"ltdr_sharpening_strength": 2.0}))


def test_a_reduced_balance_is_a_tenth():
    spec = spec_of(Row("", preset("ltdr"), TEXT, "", "LTDR", {"ltdr_balance": "reduced"}))
    assert spec.router_options == {"balance_weights": {"vision": 0.001, "language": 0.01}}
    assert spec.activates_tail  # LTDR's second module stays, unless it is switched off


def test_sharpening_losses_are_recorded():
    hparams = {**default_hparams("LTDR", "Debug28"), "ltdr_sharpening": "variance"}
    algorithm = get_algorithm_class("LTDR")((3, 28, 28), 2, 2, hparams)
    data = [(torch.randn(4, 3, 28, 28), torch.tensor([0, 1, 0, 1])) for _ in range(2)]
    numbers = algorithm.update(data)
    assert numbers["variance_loss"] < 0
    assert numbers["balance_loss"] == pytest.approx(numbers["variance_loss"])  # of the two layers
