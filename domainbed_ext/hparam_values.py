"""What a hyper-parameter means, which values it can take, and what to say about impossible ones.

One table for all algorithms: a name means the same everywhere. `hparams.py` holds defaults and
random draws.
"""

from __future__ import annotations

import json
from typing import Any

from domainbed_ext.errors import UsageError
from domainbed_ext.hparam_kinds import (
    Choice,
    Flag,
    Folder,
    Integer,
    Layers,
    Name,
    Number,
    RefusedError,
    Values,
)
from domainbed_ext.router_hparams import DEEPSEEK_SETTINGS, GROUPS_SETTINGS

VALUES: dict[str, Values] = {
    # DomainBed's own
    "data_augmentation": Flag("augment the training images"),
    "resnet18": Flag("ResNet-18 instead of ResNet-50"),
    "resnet50_augmix": Flag("ResNet-50 weights trained with AugMix"),
    "dinov2": Flag("DINOv2 features (with vit)"),
    "vit": Flag("a ViT featurizer instead of a ResNet"),
    "vit_attn_tune": Flag("train the ViT's attention only"),
    "freeze_bn": Flag("keep BatchNorm in evaluation mode"),
    "lars": Flag("the LARS optimizer"),
    "linear_steps": Integer("steps of linear probing first"),
    "resnet_dropout": Number("dropout after the ResNet", high=1.0, high_open=True),
    "vit_dropout": Number("dropout after the ViT", high=1.0, high_open=True),
    "class_balanced": Flag("draw each class equally often"),
    "nonlinear_classifier": Flag("a three-layer classifier"),
    "lr": Number("learning rate", low_open=True),
    "weight_decay": Number("weight decay"),
    "batch_size": Integer("images per training domain and step", low=1),
    # how any network is trained
    "weight_averaging": Choice("whose weights predict", ("none", "ema", "swad")),
    "ema_decay": Number("decay of the moving average; 0: 0.999", high=1.0, high_open=True),
    "swad_n_converge": Integer("evaluations that show that the loss has converged", low=1),
    "swad_n_tolerance": Integer("evaluations above the threshold that end the average", low=1),
    "swad_tolerance_ratio": Number("how far above the converged loss the threshold is"),
    "evaluate_raw": Flag("evaluate the weights before averaging too"),
    "precision": Choice("arithmetic of the network", ("fp32", "bf16")),
    "eval_batch_size": Integer("images per evaluation batch", low=1),
    "fused_optimizer": Choice("one kernel per step; auto: on CUDA", ("auto", "on", "off")),
    "channels_last": Flag("hand images to convolutions with their channels last"),
    # the ViT algorithms
    "backbone": Name("timm name of the dense model"),
    "pretrained": Flag("start from the backbone's published weights"),
    "augmentation": Choice("recipe of the training images", ("domainbed", "style", "none")),
    "optimizer": Choice("optimizer", ("adam", "adamw")),
    "schedule": Choice("course of the learning rate", ("constant", "cosine", "one_cycle")),
    "schedule_steps": Integer("length of that course; 0: the run's number of steps"),
    "warmup_fraction": Number("part of the course that warms up", high=1.0, high_open=True),
    "label_smoothing": Number("label smoothing", high=1.0, high_open=True),
    "drop_path": Number("stochastic depth of the last block", high=1.0, high_open=True),
    "grad_clip": Number("largest gradient norm; 0: off"),
    "compile": Choice("what of the network is compiled for training", ("none", "blocks")),
    # the mixtures of experts
    "moe_num_experts": Integer("experts per sparse block (DYNAMIC: at the start)", low=1),
    "moe_top_k": Integer("experts per token", low=1),
    "moe_layers": Layers("which blocks are sparse"),
    "moe_gate": Choice("how a token scores the experts", ("cosine", "linear")),
    "moe_weighting": Choice(
        "weights of the chosen experts", ("renormalize", "raw", "softmax_of_probs")
    ),
    "moe_noise_std": Number("gate noise in training, before division by the number of experts"),
    "moe_expert_dropout": Number("dropout inside an expert", high=1.0, high_open=True),
    "moe_capacity_factor": Number("room per expert, as a multiple of a fair share; 0: no limit"),
    "moe_balance_weight": Number("weight of the load-balancing loss"),
    "moe_backend": Choice(
        "how experts are computed", ("auto", "loop", "blocked", "grouped", "dense", "triton")
    ),
    "moe_dispatcher": Choice(
        "how tokens reach their experts", ("local", "all_to_all", "tutel", "auto")
    ),
    "ltdr_tail_top_k": Integer("experts per tail token; 0: all of them"),
    "ltdr_tail_scope": Choice(
        "tokens that set the tail threshold in training", ("batch", "image", "global", "ema")
    ),
    "ltdr_eval_tail_scope": Choice("tokens that set it in evaluation", ("image", "batch", "ema")),
    "ltdr_selection": Choice(
        "which tokens get more experts",
        ("vtt", "vht", "vtt_fixed", "vtt_learned", "iat", "expert_choice"),
        refused={
            "iat_instruction": (
                "asks what an instruction attends to, and a ViT has no text; use 'iat', which asks "
                "the class token, or TailRule(kind='attention') in a vision-language model"
            ),
            "language": (
                "looks for tail tokens among text (TsDEA), which a ViT has none of; in a "
                "vision-language model it is preset('swapped')"
            ),
        },
    ),
    "ltdr_selection_fraction": Number(
        "their share, for vtt_fixed and iat", high=1.0, low_open=True
    ),
    "ltdr_second_expert": Choice(
        "how the second of two experts is found: the second best, or drawn", ("argmax", "gumbel")
    ),
    "ltdr_sharpening": Choice(
        "what else makes tokens surer of their experts",
        ("none", "temperature", "entropy", "variance"),
    ),
    "ltdr_sharpening_strength": Number("that temperature or weight; 0: 0.7, or 0.01 for a weight"),
    "ltdr_balance": Choice(
        "which tokens are balanced: text alone, or vision too with a tenth of the weight",
        ("language", "reduced"),
        refused={
            "all": "is the balanced model; use the algorithm GMOE_EEA, or GMOE",
            "none": (
                "(-ALB) leaves text unbalanced too, which a ViT has none of: 'language' balances "
                "nothing here"
            ),
            "vision": (
                "(-LLB, DAR on language) leaves text alone and balances vision, but a ViT has no "
                "text; in a vision-language model it is preset('no_language_balance')"
            ),
        },
    ),
    "task_mode": Choice(
        "what training domains are to the router", ("supervised", "contrastive", "hard")
    ),
    "task_weight": Number("weight of the task loss, supervised and contrastive"),
    "task_temperature": Number("temperature of the contrastive task loss", low_open=True),
    "task_unseen": Choice("experts of an unseen domain, hard", ("uniform", "nearest")),
    "cluster_count": Integer("clusters of images, where there are enough of them", low=1),
    "cluster_temperature": Number("temperature of the choice of experts", low_open=True),
    "cluster_universal": Flag("the last expert computes every image"),
    "deepseek_setting": Choice(
        "number x width of the shared experts and of the routed ones", DEEPSEEK_SETTINGS
    ),
    "deepseek_top_k": Integer("routed experts per token; 0: two networks' width active in all"),
    "deepseek_init_scale_shared": Number("factor on the shared expert's output at the start"),
    "groups_setting": Choice("experts and top-k of the two groups", GROUPS_SETTINGS),
    "groups_by": Choice(
        "which tokens have experts of their own: the class token, or language", ("cls", "modality")
    ),
    "instruct_cls": Choice("class token in the mean of the patches", ("exclude", "include")),
    "dynamic_max_experts": Integer("experts that the pool may grow to", low=1),
    "dynamic_cycle": Integer("steps between two changes of the pool; 0: it never changes"),
    "dynamic_loss": Choice("loss of DynMoE's router", ("diversity", "gshard", "deepspeed")),
    "stgc_weight": Number("weight of the loss that parts conflicting tokens"),
    "stgc_threshold": Number("gradient cosine below which a token conflicts", low=-1.0, high=1.0),
    "stgc_divide_by_experts": Flag("divide that loss by the number of experts"),
    "evomoe_dense_share": Number(
        "share of the steps that train all but the routers", high=1.0, high_open=True
    ),
    "evomoe_evolution_share": Number(
        "share of the steps after them in which experts evolve", high=1.0, high_open=True
    ),
    "evomoe_evolution": Choice(
        "how experts follow the first one", ("scaled_update", "ema", "one_step")
    ),
    "evomoe_train_head": Flag("train the classifier in the last two stages, too"),
    "evomoe_hypernetworks": Choice(
        "tokens that have one of their own", ("shared", "modality", "cls")
    ),
    "evomoe_hidden_dim": Integer("hidden width of a hypernetwork", low=1),
    "evomoe_rank": Integer("width of the network that it makes for a token", low=1),
    "distill_teacher": Folder("folder of the finished run to learn from"),
    "distill_weight": Number("weight of the distillation loss"),
    "distill_beta": Number("power of the difference that weighs a class; 0, or at least 1"),
    "distill_logits": Choice(
        "what is compared: each class with the rest, or logits as they are", ("ovr", "raw")
    ),
    "distill_detach_weight": Flag("no gradient through that weight of a class"),
}


def check_value(name: str, value: object) -> Any:
    """The value of a known hyper-parameter, or a UsageError that names it, its value and what is
    possible.
    """
    values = VALUES[name]
    try:
        return values.checked(value)
    except RefusedError as refusal:
        raise UsageError(f"hparam {name}={_shown(value)} {refusal}") from None
    except (ValueError, OverflowError):
        raise UsageError(
            f"hparam {name}={_shown(value)} is impossible; expected {values.describe()}"
        ) from None


def read_json_object(json_text: str | None) -> dict[str, Any]:
    """The JSON object given as --hparams; None or nothing but blanks is an empty one."""
    if json_text is None or not json_text.strip():
        return {}
    example = """write it as '{"lr": 1e-4, "batch_size": 16}', the quotes included"""
    try:
        value = json.loads(json_text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        near = json_text[max(0, error.pos - 15) : error.pos + 15]
        raise UsageError(
            f"--hparams is not valid JSON at line {error.lineno} column {error.colno}, "
            f"near {near!r} ({error.msg}); {example}"
        ) from None
    if not isinstance(value, dict):
        raise UsageError(
            f"--hparams is JSON but not an object: {json_text.strip()[:60]!r}; {example}"
        )
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--hparams gives {name!r} twice; keep one of them")
    return dict(pairs)


def _shown(value: object) -> str:
    words = {True: "true", False: "false"}
    if isinstance(value, bool):
        return words[value]
    return "null" if value is None else repr(value)
