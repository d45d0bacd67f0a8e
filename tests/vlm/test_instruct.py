"""INSTRUCT in a language model: the prompt chooses, in training and while decoding."""

import pytest
import torch

pytest.importorskip("transformers")

from gmoe_ltdr import collect_routing
from tests.vlm.llavas import IMAGE, PAD, questions, sparse_llava

NO_TAIL = {"preset": "gmoe_dar", "router": "instruct"}


def weights_of(model, batch):
    """Each sequence's weights (B, E), layer by layer."""
    with torch.no_grad(), collect_routing(model) as routings:
        model(**batch)
    plans = routings.values()
    return [plan.combine_weights_TE.view(*plan.shape_BL, 4) for plan in plans]


def with_answer(batch, length=3):
    """The same questions and some words more, which are the labels."""
    answer = torch.tensor([[7, 8, 9], [10, 11, 12]])[:, :length]
    ids = torch.cat([batch["input_ids"], answer], 1)
    labels = torch.cat([torch.full_like(batch["input_ids"], -100), answer], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(answer)], 1)
    return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}


def test_the_words_of_the_prompt_choose_for_the_whole_sequence():
    model, batch = sparse_llava(**NO_TAIL), questions()
    for weights in weights_of(model, batch):
        first, second = weights
        assert torch.equal(first, first[:1].expand_as(first))
        assert not second[:2].any()  # padding
        assert torch.equal(second[2:], second[2:3].expand_as(second[2:]))
        assert not torch.equal(first[0], second[2])


def test_the_answer_has_no_say_in_training():
    model, batch = sparse_llava(**NO_TAIL), questions()
    asked = weights_of(model, batch)
    for answered, prompt in zip(weights_of(model, with_answer(batch)), asked, strict=True):
        torch.testing.assert_close(answered[:, 5], prompt[:, 5])
        torch.testing.assert_close(answered[:, -1], prompt[:, 5])


def test_cached_decoding_equals_the_answer_in_training():
    """Token by token, as `generate` does it, against one forward over prompt and answer."""
    model, batch = sparse_llava(**NO_TAIL), questions()
    whole = with_answer(batch)
    with torch.no_grad():
        expected = model(**whole).logits[:, -4:-1]
        step = model(**batch, use_cache=True)
        found, mask = [step.logits[:, -1]], batch["attention_mask"]
        for token in whole["input_ids"][:, -3:-1].T:
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
            step = model(
                input_ids=token.unsqueeze(1),
                attention_mask=mask,
                past_key_values=step.past_key_values,
                use_cache=True,
            )
            found.append(step.logits[:, -1])
    torch.testing.assert_close(torch.stack(found, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate(options):
    model, batch = sparse_llava(**NO_TAIL), questions()
    seen = []
    layer = model.decoder.layers[0].mlp
    layer.router.register_forward_hook(
        lambda _router, _inputs, plan: seen.append(plan.logits_TE.view(*plan.shape_BL, 4)[:, 0])
    )
    generation = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": PAD}
    first = model.generate(**batch, **generation, **options)
    assert len(seen) >= 4
    prompt = seen[0]
    for decoded in seen[1:]:
        torch.testing.assert_close(decoded, prompt)
    # nothing of one generation is left for the next
    alone = {name: value[1:] for name, value in batch.items()}
    again = model.generate(**alone, **generation, **options)
    assert torch.equal(again[0, :15], first[1, :15])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_cache_the_prompt_still_decides_alone(options, seed):
    model, batch = sparse_llava(**NO_TAIL), questions(seed=seed)
    generation = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD, **options}
    generation["suppress_tokens"] = [IMAGE]  # of which LLaVA would want to know the picture
    cached = model.generate(**batch, **generation)
    assert torch.equal(model.generate(**batch, **generation, use_cache=False), cached)
    # a forward of its own over the same tokens is no generation: there, all words are the prompt
    assert model._prompt_length is None


def test_prompts_are_not_cut_up():
    with pytest.raises(ValueError, match="'instruct' looks at the whole of it"):
        sparse_llava(**NO_TAIL).generate(**questions(), max_new_tokens=1, prefill_chunk_size=4)
