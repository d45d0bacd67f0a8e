"""Distillation of a sparse classifier into a dense one: each class's score by itself.

After binary classification knowledge distillation (BCKD, arXiv 2308.14286), which compares class by
class instead of whole distributions, and looks most at classes where the two models differ most.

Shapes: B images, C classes.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ClassLogits = Literal["ovr", "raw"]


def one_versus_rest(logits_BC: Tensor) -> Tensor:
    """Each class's logit against all others together: z_c - log sum over j != c of exp z_j.

    Its sigmoid is the softmax probability. Logits trained by cross-entropy are known up to a
    constant for each image, which this removes.
    """
    num_classes = logits_BC.shape[-1]
    itself_CC = torch.eye(num_classes, dtype=torch.bool, device=logits_BC.device)
    others_BCC = logits_BC.unsqueeze(-2).masked_fill(itself_CC, -torch.inf)
    return logits_BC - others_BCC.logsumexp(-1)


def bckd_loss(
    student_BC: Tensor,
    teacher_BC: Tensor,
    *,
    beta: float = 1.0,
    logits: ClassLogits = "ovr",
    detach_weight: bool = False,
) -> Tensor:
    """How far a student's class scores are from a teacher's: summed over classes, mean over images.

    Of each class |q_t - q_s|^beta * BCE(q_s, q_t), where q are the sigmoids of the two models'
    logits. In float32; no gradient reaches the teacher.

    Args:
        student_BC: The student's logits.
        teacher_BC: The teacher's.
        beta: 0 weighs all classes alike.
        logits: "ovr" compares each class with the rest, see `one_versus_rest`; "raw" takes the
            sigmoids of the logits as they are, for models trained by binary cross-entropy.
        detach_weight: Let the gradient pass through the cross-entropy alone, not the weight.

    Raises:
        ValueError: Shapes that differ, fewer than two classes, or a beta below 1 that is not 0,
            whose gradient would be infinite where the models agree.
    """
    if student_BC.shape != teacher_BC.shape:
        raise ValueError(
            f"the student's logits have shape {tuple(student_BC.shape)}, the teacher's "
            f"{tuple(teacher_BC.shape)}"
        )
    if student_BC.shape[-1] < 2:
        raise ValueError("distillation class by class needs two classes or more")
    if beta != 0 and beta < 1:
        raise ValueError(f"beta={beta} must be 0, or at least 1")
    student_BC, teacher_BC = student_BC.float(), teacher_BC.detach().float()
    if logits == "ovr":
        student_BC, teacher_BC = one_versus_rest(student_BC), one_versus_rest(teacher_BC)
    target_BC = teacher_BC.sigmoid()
    entropy_BC = F.binary_cross_entropy_with_logits(student_BC, target_BC, reduction="none")
    if beta == 0:
        return entropy_BC.sum(-1).mean()
    weight_BC = (target_BC - student_BC.sigmoid()).abs().pow(beta)
    if detach_weight:
        weight_BC = weight_BC.detach()
    return (weight_BC * entropy_BC).sum(-1).mean()
