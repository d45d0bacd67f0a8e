"""A dense ViT that learns from a finished sparse run as well as from labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from domainbed_ext.algorithms.base import Algorithm, register_algorithm
from domainbed_ext.algorithms.vit import ERM_ViT
from domainbed_ext.errors import UsageError
from domainbed_ext.saved_models import load_algorithm, read_model_info
from gmoe_ltdr.distill import bckd_loss

# What a record says of the teacher: which run it was.
_IDENTITY = ("algorithm", "dataset", "test_envs", "trial_seed", "hparams_seed", "seed")


@register_algorithm
class DISTILL(ERM_ViT):
    """The dense twin of a sparse model: cross-entropy plus `distill_weight` times BCKD.

    The teacher predicts in evaluation mode, each image by itself. It is no part of this algorithm's
    state: checkpoints and the saved model hold the student alone, which needs no teacher to
    predict.
    """

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self._teacher: list[Algorithm] = []  # a list, to be no part of the state

    def prepare(self, environments):
        self.teacher_on(next(self.network.parameters()).device)  # what is wrong with it, now

    def loss(self, x, y, domains):
        hparams = self.hparams
        logits = self.run_network(x)
        task_loss = self.task_loss(logits, y)
        with torch.no_grad():
            taught = self.teacher_on(x.device).predict(x)
        distillation = hparams["distill_weight"] * bckd_loss(
            logits,
            taught,
            beta=hparams["distill_beta"],
            logits=hparams["distill_logits"],
            detach_weight=hparams["distill_detach_weight"],
        )
        return task_loss + distillation, {
            "task_loss": task_loss.detach(),
            "distillation_loss": distillation.detach(),
            "teacher_agreement": (logits.argmax(1) == taught.argmax(1)).float().mean(),
        }

    def diagnostics(self):
        run = read_model_info(self.hparams["distill_teacher"])["args"]
        return {"teacher": {name: run[name] for name in _IDENTITY if name in run}}

    def teacher_on(self, device: torch.device) -> Algorithm:
        """The teacher, loaded at first.

        Raises:
            UsageError: None was named, or one for other images or classes.
        """
        if not self._teacher:
            input_shape, num_classes, _ = self._arguments
            teacher = load_teacher(self.hparams, tuple(input_shape), num_classes)
            self._teacher.append(teacher.to(device))
        return self._teacher[0]


def load_teacher(
    hparams: Mapping[str, Any], input_shape: tuple[int, ...], num_classes: int
) -> Algorithm:
    """The algorithm of the run that `distill_teacher` names, in evaluation mode."""
    folder = teacher_folder(hparams)
    info = read_model_info(folder)
    theirs = (tuple(info["model_input_shape"]), info["model_num_classes"])
    if theirs != (input_shape, num_classes):
        raise UsageError(
            f"the teacher {folder} tells {theirs[1]} classes of images {theirs[0]} apart, but here "
            f"are {num_classes} of {input_shape}"
        )
    # images are judged by themselves and without a draw, or what a student is to learn would depend
    # on the batch, and on chance
    settled = {"ltdr_eval_tail_scope": "image", "ltdr_second_expert": "argmax"}
    changes = {name: value for name, value in settled.items() if name in info["model_hparams"]}
    with torch.random.fork_rng(devices=[]):  # a resumed run loads it at another step
        teacher: Any = load_algorithm(folder, hparams=changes)
    return teacher.requires_grad_(False)


def teacher_folder(hparams: Mapping[str, Any]) -> str:
    """The folder of the teacher's run."""
    folder = str(hparams["distill_teacher"])
    if not folder:
        raise UsageError(
            "DISTILL learns from a finished run: name its folder with the hparam distill_teacher, "
            "or use `ltdr distill --teacher RUN`"
        )
    return folder


def check_teacher(hparams: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Refuses a teacher that has seen what the run is to be measured on.

    Args:
        hparams: Of the run.
        args: Of the run, as records hold them.
    """
    folder = teacher_folder(hparams)
    run = read_model_info(folder)["args"]
    if run["dataset"] != args["dataset"]:
        return
    tested_on = [env for env in args["test_envs"] if env not in run["test_envs"]]
    if tested_on:
        raise UsageError(
            f"the teacher {folder} was trained on domain {tested_on[0]}, which this run is to be "
            f"tested on; its own test domains are {run['test_envs']}"
        )
    for name in ("trial_seed", "holdout_fraction"):
        if run[name] != args[name]:
            raise UsageError(
                f"the teacher {folder} has {name} {run[name]}, not {args[name]}: it was trained on "
                "images that this run validates on"
            )
