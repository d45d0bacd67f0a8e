"""A trained tail threshold: what it is told about the loss (`TailRule(kind="learned")`).

A token is tail or it is not, which has no gradient. So the weights of the chosen experts stay as
they were decided, and get the gradient of weights that go smoothly from those of an ordinary token
to those of a tail token (straight-through): at the degree sigmoid(distance / threshold), where
distance is how far the token's RPV lies on the tail's side of the threshold. Experts that were not
chosen computed nothing and say nothing.

Shapes: B images, L tokens per image, T = B * L, E experts.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from gmoe_ltdr.routing import Routing
from gmoe_ltdr.tail import TailRule


def let_threshold_learn(
    routing: Routing,
    threshold: Tensor,
    rule: TailRule,
    *,
    rpv_BL: Tensor,
    compared_BL: Tensor,
    head_weights_TE: Tensor,
    tail_weights_TE: Tensor,
) -> Routing:
    """The same plan, whose weights carry a gradient to the threshold.

    Args:
        routing: The plan, before capacity.
        threshold: With its graph, finite; broadcasts with `rpv_BL`.
        rule: Says whether tokens above the threshold are tail, or those below.
        rpv_BL: What was compared with the threshold; constant.
        compared_BL: Bool, the tokens that were. No other token has a say.
        head_weights_TE: Each token's weights if it were ordinary; constant.
        tail_weights_TE: Each token's weights if it were tail; constant.
    """
    side = 1.0 if rule.select == "tail" else -1.0
    # where() before any arithmetic: zero times the NaN of a token that has no say is NaN
    rpv_BL = torch.where(compared_BL, rpv_BL, 0.0)
    scale = threshold.detach().clamp(min=1e-12)
    degree_T1 = torch.sigmoid(side * (rpv_BL - threshold) / scale).reshape(-1, 1).float()
    heard_TE = routing.dispatch_mask_TE & compared_BL.reshape(-1, 1)
    step_TE = torch.where(heard_TE, tail_weights_TE - head_weights_TE, 0.0)
    slope_TE = step_TE * (degree_T1 - degree_T1.detach())
    return replace(routing, combine_weights_TE=routing.combine_weights_TE + slope_TE)
