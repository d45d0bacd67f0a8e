"""Tail tokens: which vision tokens get more experts (LTDR Eq. 9 and 11, table 7).

Shapes: B images, L tokens per image, T = B * L, E experts. Nothing here carries a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from gmoe_ltdr.routing import Modality, place_in_row

Scope = Literal["batch", "image", "global", "ema"]

# A mean of equal float32 numbers may round below them; without a margin every one would be tail.
_RELATIVE_MARGIN = 1e-6
_ABSOLUTE_MARGIN = 1e-12


@dataclass(frozen=True)
class TailRule:
    """Which vision tokens get more experts.

    Attributes:
        kind: "mean" is the paper's rule, routing-probability variance (RPV) above the mean RPV
            (VTT); "quantile" takes the share `value` with the highest RPV (VTT with a fixed ratio);
            "attention" takes, per image, the share `value` that the class token or the instruction
            attends to most (IAT); "threshold" compares with the RPV `value`; "learned" multiplies
            the mean by a trained factor; "none" selects nothing.
        value: Share for "quantile" and "attention" (0.15 if None), RPV for "threshold"; other kinds
            have none.
        scope: Over which tokens the mean or the share is taken in training: "batch" (all vision
            tokens of this forward, this layer, this rank), "image", "global" (all ranks), or "ema"
            (the batch in training, a running mean in evaluation; before there is one, the image).
        eval_scope: The same in evaluation. Only "image" and "ema" make a prediction independent of
            the other images in its batch.
        select: "tail" or its complement among the candidates, "head" (VHT).
        cls: Class and register tokens are ordinary vision tokens ("vision"), never tail and outside
            the mean ("exclude"), or always tail and outside the mean ("always_tail").
        source: RPV from clean or from noisy probabilities. Evaluation knows no noise, so a running
            mean is one of clean probabilities.
        unbiased: Sample variance (divide by E - 1) instead of population variance; Eq. 11 does not
            depend on it, reported values do.
        strict: Compare without the rounding margin.
        in_eval: Whether tail tokens get more experts in evaluation too.
        modality: Which tokens are candidates; "language" is the swapped ablation of the paper.
    """

    kind: Literal["none", "mean", "threshold", "quantile", "attention", "learned"] = "mean"
    value: float | None = None
    scope: Scope = "batch"
    eval_scope: Scope = "image"
    select: Literal["tail", "head"] = "tail"
    cls: Literal["vision", "exclude", "always_tail"] = "vision"
    source: Literal["clean", "noisy"] = "clean"
    unbiased: bool = False
    strict: bool = False
    in_eval: bool = True
    modality: Literal["vision", "language"] = "vision"

    def __post_init__(self) -> None:
        allowed = {
            "kind": ("none", "mean", "threshold", "quantile", "attention", "learned"),
            "scope": ("batch", "image", "global", "ema"),
            "eval_scope": ("batch", "image", "global", "ema"),
            "select": ("tail", "head"),
            "cls": ("vision", "exclude", "always_tail"),
            "source": ("clean", "noisy"),
            "modality": ("vision", "language"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"TailRule.{name}={getattr(self, name)!r} is not one of {', '.join(values)}"
                )
        if self.value is not None and self.kind not in ("threshold", "quantile", "attention"):
            raise ValueError(
                f"TailRule(kind={self.kind!r}, value={self.value}): only the kinds threshold, "
                "quantile and attention have a value; leave it out"
            )
        if self.kind == "threshold" and self.value is None:
            raise ValueError("TailRule(kind='threshold') needs value=, the RPV to compare with")
        if self.kind in ("quantile", "attention"):
            if self.value is not None and not 0 < self.value <= 1:
                raise ValueError(
                    f"TailRule(kind={self.kind!r}, value={self.value}): "
                    "value is the share of tokens to select, above 0 and at most 1"
                )
            if "ema" in (self.scope, self.eval_scope):
                raise ValueError(
                    f"TailRule(kind={self.kind!r}) ranks tokens, so scope='ema' has no meaning; "
                    "use 'batch' or 'image'"
                )

    @property
    def share(self) -> float:
        return 0.15 if self.value is None else self.value

    @property
    def candidate_modality(self) -> Modality:
        return Modality.VISION if self.modality == "vision" else Modality.LANGUAGE


def routing_probability_variance(probs_TE: Tensor, *, unbiased: bool = False) -> Tensor:
    """Variance of each token's routing probabilities over the experts (Eq. 9). Shape (T,).

    Between 0 (uniform) and (1/E)(1 - 1/E) (certain). Two passes: mean(p^2) - 1/E^2 halves the value
    of near-uniform tokens in float32.
    """
    num_experts = probs_TE.shape[-1]
    if num_experts == 1:
        return probs_TE.new_zeros(probs_TE.shape[:-1])
    squares = (probs_TE - 1.0 / num_experts).square().sum(-1)
    return squares / (num_experts - 1 if unbiased else num_experts)


def compared_tokens(vision_BL: Tensor, is_cls_BL: Tensor | None, rule: TailRule) -> Tensor:
    """The candidates that enter the mean and are compared with it: class tokens if they do."""
    if is_cls_BL is None or rule.cls == "vision":
        return vision_BL
    return vision_BL & ~is_cls_BL


@torch.no_grad()
def mean_rpv(
    rpv_BL: Tensor, candidates_BL: Tensor, *, scope: Scope, group: ProcessGroup | None = None
) -> Tensor:
    """Mean RPV of the candidates, float64: shape (B, 1) for scope "image", else (1, 1).

    NaN where there is no candidate; a comparison with NaN selects nothing, as it should.
    """
    per_image = scope == "image"
    total = torch.where(candidates_BL, rpv_BL.double(), 0.0).sum(-1, keepdim=True)
    count = candidates_BL.sum(-1, keepdim=True).double()
    if not per_image:
        total, count = total.sum(0, keepdim=True), count.sum(0, keepdim=True)
    if (
        scope == "global"
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
    ):
        both = torch.stack([total, count])
        torch.distributed.all_reduce(both, group=group)
        total, count = both.unbind()
    return total / count


@torch.no_grad()
def top_share(scores_BL: Tensor, candidates_BL: Tensor, share: float) -> Tensor:
    """The max(1, floor(share * candidates)) best candidates of each row; ties by index. Bool."""
    place_BL = place_in_row(torch.where(candidates_BL, scores_BL.double(), -torch.inf))
    num_candidates = candidates_BL.sum(-1, keepdim=True)
    # an epsilon keeps floor(.15 * 20) at 3 when .15 * 20 is 2.9999999
    quota = (num_candidates.double() * share + 1e-9).floor().clamp(min=1)
    return candidates_BL & (place_BL < quota)


@torch.no_grad()
def tail_tokens(
    rpv_BL: Tensor,
    vision_BL: Tensor,
    rule: TailRule,
    *,
    scope: Scope | None = None,
    is_cls_BL: Tensor | None = None,
    attention_BL: Tensor | None = None,
    threshold: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Which tokens are tail tokens (Eq. 11). Bool (B, L), a subset of `vision_BL`.

    Args:
        rpv_BL: Routing-probability variance.
        vision_BL: Bool, the candidates; language and padding tokens never enter the mean.
        rule: What makes a tail token.
        scope: Overrides `rule.scope` (evaluation passes `rule.eval_scope`).
        is_cls_BL: Bool, class and register tokens, for `rule.cls`.
        attention_BL: Scores for kind "attention".
        threshold: A ready threshold that broadcasts with `rpv_BL` (running mean, learned factor).
        group: Process group of scope "global".

    Raises:
        ValueError: Kind "attention" without attention scores.
    """
    scope = scope or rule.scope
    candidates_BL = compared_tokens(vision_BL, is_cls_BL, rule)

    if rule.kind == "none":
        return torch.zeros_like(vision_BL)
    if rule.kind == "attention":
        if attention_BL is None:
            raise ValueError(
                "TailRule(kind='attention') needs attention scores in the TokenContext; a timm ViT "
                "gets them from upcycle_(), another model must set attention_BL itself"
            )
        patches_BL = candidates_BL if is_cls_BL is None else candidates_BL & ~is_cls_BL
        tail_BL = top_share(attention_BL, patches_BL, rule.share)
    elif rule.kind == "quantile":
        if scope == "image":
            tail_BL = top_share(rpv_BL, candidates_BL, rule.share)
        else:
            tail_BL = top_share(
                rpv_BL.reshape(1, -1), candidates_BL.reshape(1, -1), rule.share
            ).view_as(candidates_BL)
    else:
        if rule.kind == "threshold":
            threshold = rpv_BL.new_tensor(rule.value, dtype=torch.float64)
        elif threshold is None:
            threshold = mean_rpv(rpv_BL, candidates_BL, scope=scope, group=group)
        if not rule.strict:
            threshold = threshold * (1 + _RELATIVE_MARGIN) + _ABSOLUTE_MARGIN
        tail_BL = candidates_BL & (rpv_BL.double() > threshold)

    if rule.select == "head":
        tail_BL = candidates_BL & ~tail_BL
    if is_cls_BL is not None and rule.cls == "always_tail":
        tail_BL = tail_BL | (is_cls_BL & vision_BL)
    return tail_BL
