"""Sparse LLaVAs in lmms-eval, found through its entry-point group `lmms_eval.models`.

    lmms-eval --model ltdr_llava --model_args pretrained=converted --tasks mme --batch_size 1

The folder needs the processor beside the model (`from_moe_llava(..., tokenizer=...)`). Questions
are answered one by one, so that no result depends on a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        f"gmoe_ltdr.vlm.lmms_eval_model needs lmms-eval ({error}): pip install lmms-eval"
    ) from error

from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration

_SAMPLING = ("temperature", "top_p", "num_beams", "max_new_tokens")


class LTDRLlavaModel(lmms):
    """A model's answers and log-likelihoods, as lmms-eval asks for them.

    Args:
        pretrained: A folder with model and processor.
        device: Where it runs; None: a GPU if there is one.
        dtype: "auto", "float32", "bfloat16", ...
        batch_size: lmms-eval's flag; answers are given one by one whatever it is.
        max_new_tokens: Where a task does not say.

    Raises:
        ValueError: An argument that is not known.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_new_tokens: int | str = 128,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"ltdr_llava knows no argument {', '.join(unknown)}; it has pretrained, device, "
                "dtype, max_new_tokens"
            )
        from transformers import AutoProcessor

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = LTDRLlavaForConditionalGeneration.from_pretrained(pretrained, dtype=dtype)
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained)
        self.max_new_tokens = int(max_new_tokens)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The model's answer to each request, cut at the task's stop strings."""
        return [self._answer(*request.args) for request in requests]

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: LLaVA's tasks are of one round."""
        raise NotImplementedError("ltdr_llava answers in one round only")

    @torch.no_grad()
    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each request's continuation, and whether it is what greedy gives."""
        found = []
        for request in requests:
            context, target, visual, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(doc)
            prompt = self._inputs(context, visual(doc))
            tokenizer = self.processor.tokenizer
            words = tokenizer(continuation, add_special_tokens=False, return_tensors="pt")
            answer_1S = words["input_ids"].to(self.model.device)
            length = prompt["input_ids"].shape[1]
            prompt["input_ids"] = torch.cat([prompt["input_ids"], answer_1S], 1)
            prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
            logits = self.model(**prompt).logits[0, length - 1 : -1].float()
            chosen = logits.log_softmax(-1).gather(1, answer_1S.T).sum()
            found.append((float(chosen), bool((logits.argmax(-1) == answer_1S[0]).all())))
        return found

    @torch.no_grad()
    def _answer(
        self,
        context: str,
        options: dict[str, Any],
        visual: Callable[[Any], Sequence[Any]],
        doc_id: int,
        task: str,
        split: str,
    ) -> str:
        inputs = self._inputs(context, visual(self.task_dict[task][split][doc_id]))
        given = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
        given.setdefault("max_new_tokens", self.max_new_tokens)
        sample = given.get("temperature", 0) > 0
        if not sample:
            given = {k: v for k, v in given.items() if k not in ("temperature", "top_p")}
        ids: Tensor = self.model.generate(**inputs, **given, do_sample=sample)
        new = ids[0, inputs["input_ids"].shape[1] :]
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True)
        stops = options.get("until") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            text = text.split(stop)[0] if stop else text
        return text.strip()

    def _inputs(self, context: str, images: Sequence[Any] | None) -> dict[str, Tensor]:
        """Of one question; its images stand in front where it does not say where."""
        images = list(images or [])
        mark = self.processor.image_token
        if mark not in context and images:
            context = " ".join([*[mark] * len(images), context])
        if self.processor.tokenizer.chat_template:
            context = self.processor.tokenizer.apply_chat_template(
                [{"role": "user", "content": context}], tokenize=False, add_generation_prompt=True
            )
        inputs = self.processor(images=images or None, text=context, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        names = ("input_ids", "attention_mask", "pixel_values")
        return {name: inputs[name] for name in names if name in inputs}


def manifest() -> Any:
    """What lmms-eval loads from the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{LTDRLlavaModel.__module__}.{LTDRLlavaModel.__name__}"
    return ModelManifest(model_id="ltdr_llava", simple_class_path=path)
