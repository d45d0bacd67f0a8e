"""A LLaVA from scratch on synthetic questions, then dense, top-2 and LTDR side by side.

One dense model learns to see, from questions and as many descriptions; from it every variant goes
on in the same way, several seeds each. What this shows: that everything trains, and what routers do
with words and with image tokens. What it does not show: that one variant is better; it says how far
apart variants lie, and how far the seeds of one.

Shapes: N questions, S tokens, V words.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gmoe_ltdr.collect import collect_routing, moe_layers
from gmoe_ltdr.stats import RoutingStats
from gmoe_ltdr.vlm.decoder import vlm_preset
from gmoe_ltdr.vlm.questions import IMAGE, NUM_IMAGE_TOKENS, PAD, WORDS, Questions, make_questions

VARIANTS = {"dense": None, "top-2": "baseline", "LTDR": "ltdr"}
_LEARNING_RATE, _BATCH_SIZE = 1e-3, 64
_DESCRIPTIONS = 0.5  # share of what is learned from
_TEST_SEED = 1_000_003


@dataclass
class Result:
    """What became of one variant.

    Attributes:
        accuracies: Share of right answers, one for each seed.
        stats: What the routers of all its models did with the test questions; None if dense.
        model: The last one.
    """

    accuracies: list[float] = field(default_factory=list)
    stats: RoutingStats | None = None
    model: Any = None

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def tiny_llava() -> Any:
    """507 thousand parameters: a CLIP of three layers, two of which are used, a Qwen2 of four."""
    from transformers import (
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
    )

    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=64,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(WORDS), hidden_size=96, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=NUM_IMAGE_TOKENS,
    )
    model = LlavaForConditionalGeneration(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            # the library's small initial weights are for large models; these would not learn
            module.reset_parameters()
    return model


def train(model: Any, questions: Questions, steps: int, seed: int) -> None:
    """AdamW at a constant rate; questions in an order that the seed gives."""
    optimizer = torch.optim.AdamW(model.parameters(), _LEARNING_RATE)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(questions), (_BATCH_SIZE,), generator=order)
        optimizer.zero_grad()
        model(**questions[chosen].inputs()).loss.backward()
        optimizer.step()


@torch.no_grad()
def evaluate(model: Any, questions: Questions, stats: RoutingStats | None = None) -> float:
    """Share of right answers; routing is counted into `stats`."""
    model.eval()
    right = 0
    for start in range(0, len(questions), 100):
        batch = questions[slice(start, start + 100)]
        inputs = batch.inputs()
        del inputs["labels"]
        if stats is None:
            logits_NSV = model(**inputs).logits
        else:
            with collect_routing(model) as routings:
                logits_NSV = model(**inputs).logits
            stats.add(routings)
        rows = torch.arange(len(batch))
        found = logits_NSV[rows, batch.answer_place - 1].argmax(-1)
        right += int((found == batch.input_ids[rows, batch.answer_place]).sum())
    return right / len(questions)


def run_demo(
    *,
    steps: int,
    seeds: Sequence[int] = (0, 1, 2),
    num_train: int | None = None,
    num_test: int = 2_000,
    tell: Callable[[str], None] = lambda _line: None,
) -> tuple[float, dict[str, Result]]:
    """Train everything.

    Args:
        steps: Of the dense model; each variant then takes a third as many.
        seeds: Each gives a variant its order of questions and its gates.
        num_train: Questions and descriptions to learn from; None: as many as the first steps see,
            up to 20,000.
        num_test: Questions of other pictures.
        tell: Is told how far it got.

    Returns:
        The dense model's accuracy after its first steps, and each variant's result by name.

    Raises:
        ImportError: transformers is missing.
    """
    from gmoe_ltdr.vlm.transformers import upcycle_llava

    num_train = num_train or min(_BATCH_SIZE * steps, 20_000)
    questions = make_questions(num_train, 0, descriptions=_DESCRIPTIONS)
    test = make_questions(num_test, _TEST_SEED)
    torch.manual_seed(0)
    dense = tiny_llava()
    tell(f"dense model, {sum(p.numel() for p in dense.parameters()):,} parameters, {steps} steps")
    train(dense, questions, steps, seed=0)
    start = evaluate(dense, test)
    tell(f"dense model: {start:.3f} of {len(test)} questions right; now {steps // 3} steps more")
    results = {name: Result() for name in VARIANTS}
    for seed in seeds:
        for name, preset in VARIANTS.items():
            torch.manual_seed(seed)
            model = copy.deepcopy(dense)
            if preset is not None:
                model = upcycle_llava(model, vlm_preset(preset))
            train(model, questions, steps // 3, seed=seed + 1)
            result = results[name]
            if preset is not None and result.stats is None:
                result.stats = RoutingStats(detailed=True)
            result.accuracies.append(evaluate(model, test, result.stats))
            result.model = model
            layers = f", {len(moe_layers(model))} sparse layers" if preset is not None else ""
            tell(f"seed {seed}, {name}{layers}: {result.accuracies[-1]:.3f}")
    return start, results
