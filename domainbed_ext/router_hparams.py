"""Hyper-parameters of the sparse algorithms, and of the dense one that learns from them, beyond
those that all ViTs have.

An algorithm is an entry of `ROUTER_HPARAMS`; what its names mean and which values they take is said
in `hparam_values.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from domainbed_ext.hparam_draws import HParam, fixed, log_uniform, one_of

# Rows of LTDR's table 6: number x width of the shared experts, and of the routed ones.
DEEPSEEK_SETTINGS = ("1x1.0+3x1.0", "1x1.0+12x0.25", "1x1.0+16x0.25")

DEFAULT_SELECTION_FRACTION = 0.15

# Rows of LTDR's table 11; DAR there is upon the first row.
GROUPS_SETTINGS = (
    *("v2Top1-t2Top1", "v4Top2-t4Top2"),
    *("v2Top1-t2Top1-DAR", "v2Top1-t2Top1-DAR-shared"),
)


def moe(algorithm: str, *, without: Collection[str] = ()) -> list[HParam]:
    """Those of every mixture of experts, less the ones that a router has no use for."""
    # GMoE as published: one expert a token and a capacity limit. The others compare routing alone,
    # without drops.
    published = algorithm == "GMOE"
    hparams = [
        HParam("moe_num_experts", 6, one_of(4, 6, 8)),
        HParam("moe_top_k", 1 if published else 2, one_of(1, 2)),
        fixed("moe_layers", "gmoe"),
        fixed("moe_gate", "cosine"),
        fixed("moe_weighting", "renormalize"),
        HParam("moe_noise_std", 1.0, one_of(0.0, 0.5, 1.0)),
        fixed("moe_expert_dropout", 0.1),
        fixed("moe_capacity_factor", 1.5 if published else 0.0),
        fixed("moe_balance_weight", 0.01),
        fixed("moe_dispatcher", "local"),
        fixed("moe_backend", "auto"),
    ]
    return [hparam for hparam in hparams if hparam.name not in without]


def tail() -> list[HParam]:
    return [
        fixed("ltdr_tail_top_k", 0),
        fixed("ltdr_tail_scope", "batch"),
        fixed("ltdr_eval_tail_scope", "image"),
        fixed("ltdr_selection", "vtt"),
        fixed("ltdr_selection_fraction", DEFAULT_SELECTION_FRACTION),
        fixed("ltdr_second_expert", "argmax"),
        fixed("ltdr_sharpening", "none"),
        fixed("ltdr_sharpening_strength", 0.0),
    ]


def task() -> list[HParam]:
    return [
        *moe("TASK"),
        fixed("task_mode", "supervised"),
        HParam("task_weight", 0.01, log_uniform(-3, -1)),
        fixed("task_temperature", 1.0),
        fixed("task_unseen", "uniform"),
    ]


def cluster() -> list[HParam]:
    return [
        *changed(moe("CLUSTER"), fixed("moe_gate", "linear"), quiet()),
        fixed("cluster_count", 128),
        HParam("cluster_temperature", 1.0, one_of(0.05, 1.0)),
        fixed("cluster_universal", False),
    ]


def instruct() -> list[HParam]:
    # the source's gate; a choice per image is the same in training and in evaluation
    return [
        *changed(moe("INSTRUCT"), fixed("moe_gate", "linear"), quiet()),
        fixed("instruct_cls", "exclude"),
    ]


def quiet() -> HParam:
    """Gate noise, by default none."""
    return HParam("moe_noise_std", 0.0, one_of(0.0, 0.5, 1.0))


def changed(hparams: list[HParam], *changes: HParam) -> list[HParam]:
    """The same names in the same order, some of them with other defaults or draws."""
    by_name = {change.name: change for change in changes}
    return [by_name.get(hparam.name, hparam) for hparam in hparams]


def dynamic() -> list[HParam]:
    """DynMoE: no top-k, no noise, no drops; the common number of experts is that of the start."""
    unused = ("moe_top_k", "moe_gate", "moe_noise_std", "moe_capacity_factor")
    return [
        *moe("DYNAMIC", without=unused),
        HParam("dynamic_max_experts", 8, one_of(8, 12)),
        fixed("dynamic_cycle", 1),
        fixed("dynamic_loss", "diversity"),
    ]


def stgc() -> list[HParam]:
    return [
        *moe("STGC"),
        HParam("stgc_weight", 1.0, one_of(0.25, 0.5, 1.0, 2.0)),
        fixed("stgc_threshold", 0.0),
        fixed("stgc_divide_by_experts", True),
    ]


def deepseek() -> list[HParam]:
    # gate, weights and noise as in the source; how many experts there are is the setting's to say
    source = (fixed("moe_gate", "linear"), fixed("moe_weighting", "raw"), quiet())
    return [
        *changed(moe("DEEPSEEK", without=("moe_num_experts", "moe_top_k")), *source),
        HParam("deepseek_setting", DEEPSEEK_SETTINGS[1], one_of(*DEEPSEEK_SETTINGS)),
        fixed("deepseek_top_k", 0),
        fixed("deepseek_init_scale_shared", 1.0),
    ]


def groups() -> list[HParam]:
    # the setting says how many experts; groups differ in size, so that a capacity has no meaning
    unused = ("moe_num_experts", "moe_top_k", "moe_capacity_factor")
    return [
        *moe("GROUPS", without=unused),
        HParam("groups_setting", GROUPS_SETTINGS[0], one_of(*GROUPS_SETTINGS)),
        fixed("groups_by", "cls"),
    ]


def evomoe() -> list[HParam]:
    unused = ("moe_gate", "moe_noise_std", "moe_capacity_factor")
    return [
        *changed(
            moe("EVOMOE", without=unused),
            HParam("moe_top_k", 1, one_of(1, 2)),
            fixed("moe_balance_weight", 0.001),
        ),
        fixed("evomoe_dense_share", 0.5),
        fixed("evomoe_evolution_share", 0.25),
        fixed("evomoe_evolution", "scaled_update"),
        fixed("evomoe_train_head", False),
        fixed("evomoe_hypernetworks", "shared"),
        fixed("evomoe_hidden_dim", 16),
        fixed("evomoe_rank", 8),
    ]


def distill() -> list[HParam]:
    # of a dense ViT, not of a router; its row is the last one
    return [
        fixed("distill_teacher", ""),
        HParam("distill_weight", 1.0, one_of(0.5, 1.0, 2.0)),
        fixed("distill_beta", 1.0),
        fixed("distill_logits", "ovr"),
        fixed("distill_detach_weight", False),
    ]


# In the order of table rows.
ROUTER_HPARAMS: dict[str, Callable[[], list[HParam]]] = {
    "GMOE": lambda: moe("GMOE"),
    "GMOE_DAR": lambda: moe("GMOE_DAR"),
    "GMOE_EEA": lambda: [*moe("GMOE_EEA"), *tail()],
    "LTDR": lambda: [*moe("LTDR"), *tail(), fixed("ltdr_balance", "language")],
    "TASK": task,
    "CLUSTER": cluster,
    "INSTRUCT": instruct,
    "DISTRIBUTION": lambda: changed(moe("DISTRIBUTION"), quiet()),
    "DYNAMIC": dynamic,
    "STGC": stgc,
    "DEEPSEEK": deepseek,
    "GROUPS": groups,
    "EVOMOE": evomoe,
    "DISTILL": distill,
}
