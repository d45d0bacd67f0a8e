"""LTDR in Hugging Face's LLaVA: the dense model's function, generation, checkpoints, training."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import AutoModelForImageTextToText

from gmoe_ltdr import balance_loss, collect_routing, moe_layers, use_expert_backend
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import vlm_preset
from gmoe_ltdr.vlm.transformers import (
    LTDRLlavaConfig,
    LTDRLlavaForConditionalGeneration,
    upcycle_llava,
)
from tests.vlm.llavas import (
    FAMILIES,
    IMAGE,
    dense_llava,
    perturb_,
    questions,
    sparse_llava,
    with_labels,
)

ATOL = 1e-5  # of logits in float32
L, V, P = (int(m) for m in (Modality.LANGUAGE, Modality.VISION, Modality.PADDING))


def routings_of(model, batch):
    with torch.no_grad(), collect_routing(model) as routings:
        model(**batch)
    return list(routings.values())


class TestTokens:
    """Which token is what, as every layer was told."""

    def told(self, batch, model=None):
        first, *rest = routings_of(model or sparse_llava(), batch)
        assert all(torch.equal(first.modality_T, routing.modality_T) for routing in rest)
        return first.modality_T.view(first.shape_BL).tolist()

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_one_image_per_row(self, side):
        row0 = [L] * 2 + [V] * 4 + [L] * 5
        row1 = [L] * 4 + [V] * 4 + [L] * 3
        row1[slice(0, 2) if side == "left" else slice(9, 11)] = [P] * 2
        assert self.told(questions(padding=side)) == [row0, row1]

    def test_several_images_and_none(self):
        row0, row1 = self.told(questions(images=1))
        assert row0 == [L] * 2 + [V] * 8 + [L]
        assert row1 == [P] * 2 + [L] * 9

    def test_text_alone(self):
        batch = questions()
        del batch["pixel_values"]
        batch["input_ids"][0, 3] = 7
        # what looks like image tokens are words: no image came with them
        assert all(V not in row for row in self.told(batch))

    def test_no_mask_is_no_padding(self):
        batch = questions(padding=None)
        batch["attention_mask"] = None
        assert all(P not in row for row in self.told(batch))

    def test_embeddings_need_a_mask(self):
        model, batch = sparse_llava(), questions()
        embeds = model.get_input_embeddings()(batch["input_ids"])
        mask = batch["attention_mask"]
        with pytest.raises(ValueError, match=r"vision_mask, a bool tensor of shape \(2, 11\)"):
            model(inputs_embeds=embeds, attention_mask=mask)
        vision = torch.zeros(2, 11, dtype=torch.bool)
        vision[:, 5] = True
        row0 = [L] * 5 + [V] + [L] * 5
        row1 = [P] * 2 + row0[2:]
        given = {"inputs_embeds": embeds, "attention_mask": mask, "vision_mask": vision}
        assert self.told(given, model) == [row0, row1]
        with pytest.raises(ValueError, match=r"vision_mask has shape \(2, 4\)"):
            model(inputs_embeds=embeds, vision_mask=vision[:, :4])
        with pytest.raises(ValueError, match="got neither"):
            model(attention_mask=mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_upcycling_keeps_the_function(family):
    dense, batch = dense_llava(family), questions()
    with torch.no_grad():
        expected = dense(**batch).logits
    model = upcycle_llava(dense, vlm_preset("ltdr"))
    assert list(moe_layers(model)) == [f"model.language_model.layers.{i}.mlp" for i in (0, 2)]
    with torch.no_grad():
        logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=ATOL, rtol=0)
    assert any(routing.tail_mask_T.any() for routing in routings_of(model, batch))
    # and it is not by accident that nothing changed
    with torch.no_grad():
        assert (perturb_(model)(**batch).logits[real] - expected[real]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_does_not_depend_on_the_cache(family):
    model, batch = sparse_llava(family), questions()
    # transformers 4.57 cannot go on after an image token without a cache
    options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
    cached = model.generate(**batch, **options, use_cache=True)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
    # greedy by hand, everything recomputed; the generated tokens are language
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(6):
        with torch.no_grad():
            logits = model(ids, batch["pixel_values"], mask).logits
        logits[..., IMAGE] = -torch.inf
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(cached, ids)


def test_generation_with_a_static_cache_and_padding():
    model, batch = sparse_llava(), questions()
    expected = model.generate(**batch, max_new_tokens=5, do_sample=False)
    with collect_once(model) as told:
        found = model.generate(
            **batch, max_new_tokens=5, do_sample=False, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
    assert torch.equal(found, expected)
    assert told[0][1, :2].tolist() == [P, P]  # read off a mask of four dimensions


class collect_once:  # noqa: N801
    """The modality of every forward, of which a generation has several."""

    def __init__(self, model):
        self.layer, self.told = next(iter(moe_layers(model).values())), []

    def __enter__(self):
        def keep(_router, inputs):
            self.told.append(inputs[1].modality_BL.clone())

        self.handle = self.layer.router.register_forward_pre_hook(keep)
        return self.told

    def __exit__(self, *_error):
        self.handle.remove()


def test_every_beam_is_told():
    model, batch = sparse_llava(), questions()
    with collect_once(model) as told:
        found = model.generate(**batch, num_beams=3, max_new_tokens=4, do_sample=False)
    assert found.shape == (2, 15)
    assert (told[0] == V).sum(1).unique().tolist() == [4]
    assert all((later == L).all() and later.shape == (6, 1) for later in told[1:])
    one_row = {name: value[:1] for name, value in batch.items()}
    alone = model.generate(**one_row, num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(alone, found[:1])


def test_a_prompt_decides_for_what_is_generated_after_it():
    """INSTRUCT: the tokens of an answer follow their prompt's experts, beams included."""
    model, batch = sparse_llava(preset="baseline", router="instruct"), questions()
    plans = []
    handle = next(iter(moe_layers(model).values())).router.register_forward_hook(
        lambda _router, _inputs, plan: plans.append(plan)
    )
    model.generate(**batch, max_new_tokens=3, num_beams=2, do_sample=False)
    handle.remove()
    prompt, *steps = plans
    by_row = prompt.logits_TE.view(4, 11, 4)[:, -1]
    assert len(steps) == 2
    assert not torch.equal(by_row[0], by_row[2])  # the two prompts differ
    for step in steps:
        assert torch.equal(step.logits_TE, by_row)


def test_the_answer_does_not_decide():
    """In training, INSTRUCT looks at language that has no label."""
    model = sparse_llava(preset="baseline", router="instruct")
    batch = with_labels(questions(padding=None))
    batch["labels"][:, :9] = -100  # two tokens of answer
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][:, 9:] = 7
    plans = []
    for inputs in (batch, other):
        with torch.no_grad(), collect_routing(model) as routings:
            model(**inputs)
        # the first layer alone: attention spreads what differs
        plans.append(routings["model.language_model.layers.0.mlp"])
    torch.testing.assert_close(plans[0].logits_TE, plans[1].logits_TE)


def test_generation_from_embeddings():
    model, batch = sparse_llava(), questions(padding=None)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**batch, **options)[:, 11:]
    embeds = model.get_input_embeddings()(batch["input_ids"])
    features = model.get_image_features(batch["pixel_values"])
    features = getattr(features, "pooler_output", features)
    vision = batch["input_ids"] == IMAGE
    embeds[vision] = torch.cat(list(features)).to(embeds.dtype)
    found = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], vision_mask=vision, **options
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generation_with_a_mask_of_the_prompt(options):
    model, batch = sparse_llava(), questions()
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE], **options}
    expected = model.generate(**batch, **options)
    vision = batch["input_ids"] == IMAGE
    for use_cache in (True, False):
        found = model.generate(**batch, **options, vision_mask=vision, use_cache=use_cache)
        assert torch.equal(found, expected)


def test_chunks_of_a_prompt_are_refused():
    with pytest.raises(ValueError, match="prefill_chunk_size=4 would cut images apart"):
        sparse_llava().generate(**questions(), prefill_chunk_size=4, max_new_tokens=1)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"preset": "swapped"}, "the tail rule compares words with each other"),
        ({"preset": "ltdr_expert_choice"}, "'expert_choice' chooses among all tokens"),
        (
            {"capacity_factor": 1.0, "router_options": {"eval_capacity": "batch"}},
            "experts have a capacity in evaluation",
        ),
        (
            {
                "preset": "baseline",
                "router": "task_hard",
                "router_options": {"num_tasks": 2, "unseen": "nearest"},
            },
            "goes by the mean of all tokens",
        ),
    ],
)
def test_what_compares_words_needs_a_cache(settings, reason):
    model, batch = sparse_llava(**settings), questions()
    config = copy.deepcopy(model.generation_config)
    config.use_cache = False
    for options in ({"use_cache": False}, {"generation_config": config}):
        with pytest.raises(ValueError, match=f"{reason}.*; leave use_cache at True"):
            model.generate(**batch, max_new_tokens=1, **options)


def test_a_row_does_not_depend_on_its_batch_mates():
    model, batch = sparse_llava(), questions()
    one_row = {name: value[:1] for name, value in batch.items()}
    with torch.no_grad():
        together, alone = model(**batch).logits[:1], model(**one_row).logits
    torch.testing.assert_close(together, alone, atol=ATOL, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_language_is_plain_top_k(top_k):
    """Bit for bit, since nothing but the tail rule tells the two apart."""
    batch = with_labels(questions())
    del batch["pixel_values"]
    found = []
    for name in ("ltdr", "baseline"):
        model = sparse_llava(preset=name, top_k=top_k)
        found.append(model(**batch))
    assert torch.equal(found[0].logits, found[1].logits)
    assert torch.equal(found[0].aux_loss, found[1].aux_loss)


def test_the_loss_is_cross_entropy_and_balance():
    model, batch = sparse_llava(), with_labels(questions())
    with collect_routing(model) as routings:
        output = model(**batch)
    # by hand: token t predicts token t + 1
    logits, labels = output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    cross_entropy = nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    aux = balance_loss(routings, model.config.spec)
    torch.testing.assert_close(output.aux_loss, aux)
    torch.testing.assert_close(output.loss, cross_entropy + aux)
    assert aux > 0.019  # two layers, weight 0.01, at least 1 each but for rounding
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss)
    del batch["labels"]
    assert model(**batch).aux_loss is None


def test_balance_sends_no_gradient_to_vision_and_padding():
    model, batch = sparse_llava(), with_labels(questions())
    seen = {}
    for name, layer in moe_layers(model).items():

        def keep(_layer, inputs, name=name):
            seen[name] = inputs[0]
            inputs[0].retain_grad()

        layer.register_forward_pre_hook(keep)
    output = model(**batch)
    output.aux_loss.backward(inputs=[seen["model.language_model.layers.2.mlp"]])
    grad = seen["model.language_model.layers.2.mlp"].grad
    text = (batch["labels"] != -100)[..., None]
    assert (grad.masked_select(~text) == 0).all()
    assert (grad.abs().sum(-1, keepdim=True).masked_select(text) > 0).all()


def gradients(model, batch, between=None):
    model.zero_grad()
    loss = model(**batch).loss
    if between is not None:
        between()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_nothing(family):
    model, batch = sparse_llava(family).train(), with_labels(questions())
    other = with_labels(questions(seed=5, images=1, padding="right"))
    expected = gradients(model, batch)
    assert any("router.gate.weight" in name for name in expected)
    model.gradient_checkpointing_enable()
    for between in (None, lambda: model(**other)):
        found = gradients(model, batch, between)
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), name
    model.gradient_checkpointing_disable()
    assert torch.equal(gradients(model, batch)[name], expected[name])


def test_checkpointing_with_a_context_of_the_users_own():
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    model, batch = sparse_llava().train(), with_labels(questions())
    expected = gradients(model, batch)

    def selective():
        def policy(_ctx, op, *args, **kwargs):
            keep = op is torch.ops.aten.addmm.default
            return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    model.gradient_checkpointing_enable({"context_fn": selective})
    found = gradients(model, batch)
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="balance loss without gradient"):
        sparse_llava().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family, tmp_path):
    model, batch = sparse_llava(family, top_k=1, tail_rule=TailRule(eval_scope="ema")), questions()
    model.train()(**batch)  # the running mean is part of the model
    model.eval().save_pretrained(tmp_path)
    expected = model(**batch).logits
    for cls in (LTDRLlavaForConditionalGeneration, AutoModelForImageTextToText):
        twin, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert type(twin) is LTDRLlavaForConditionalGeneration
        assert not any(info.values()), info
        assert twin.config.spec == model.config.spec
        assert torch.equal(twin(**batch).logits, expected)


def test_loading_a_dense_checkpoint_says_what_is_missing(tmp_path):
    dense_llava().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"upcycle_llava\(model, spec\)"):
        LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path)


def test_half_precision_keeps_routing_in_float32(tmp_path):
    model, batch = sparse_llava(), with_labels(questions())
    reference = model(**batch)
    model.save_pretrained(tmp_path)
    half = LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {"router" in name: p.dtype for name, p in half.named_parameters()}
    assert types == {True: torch.float32, False: torch.bfloat16}
    cast = sparse_llava().to(torch.bfloat16)  # with everything that is in it
    for model in (half, cast):
        output = model.train()(**batch)
        output.loss.backward()
        assert (output.loss - reference.loss).abs() < 5e-2
        assert all(torch.isfinite(p.grad).all() for p in model.decoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = sparse_llava()(**batch)
    assert (output.loss - reference.loss).abs() < 5e-2


def test_half_precision_moves_few_tokens_over_the_threshold():
    single, half = sparse_llava(), sparse_llava().to(torch.bfloat16)
    flips = []
    for seed in range(12):
        batch = questions(seed=seed)
        in_half = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
        pairs = zip(routings_of(single, batch), routings_of(half, in_half), strict=True)
        for one, other in pairs:
            vision = one.of(Modality.VISION)
            flips.append((one.tail_mask_T != other.tail_mask_T)[vision].float().mean())
    assert torch.stack(flips).mean() <= 0.05


def test_back_ends_agree():
    model, batch = sparse_llava(), questions()
    with torch.no_grad():
        expected = model(**batch).logits
        for name in ("loop", "dense", "grouped"):
            logits = use_expert_backend(model, name)(**batch).logits
            torch.testing.assert_close(logits, expected, atol=ATOL, rtol=0)


def test_any_spec_passes_through():
    for overrides in (
        {"layers": (1, -1), "num_experts": 3},
        {"gate": "cosine", "shared_experts": 1},
        {"weighting": "softmax_of_probs", "tail_top_k": 3},
        {"tail_rule": TailRule(kind="quantile", value=0.2)},
        {"tail_rule": TailRule(select="head")},
        {"capacity_factor": 1.0, "router_options": {"capacity_convention": "deepspeed"}},
        {"preset": "swapped"},
        {"preset": "reduced_balance"},
        {"preset": "deepseek_1x1.0+12x0.25"},
        {"preset": "dynamic"},
        {"preset": "evomoe"},
        {"router": "instruct"},
    ):
        model = sparse_llava(**overrides)
        output = model.train()(**with_labels(questions()))
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert LTDRLlavaConfig.from_dict(model.config.to_dict()).spec == model.config.spec


def test_bad_input_is_refused_when_the_model_is_made():
    dense = dense_llava()
    with pytest.raises(ValueError, match="top_k=5 must lie between 1 and num_experts=4"):
        vlm_preset("ltdr", top_k=5)
    with pytest.raises(ValueError, match="the model has blocks 0 to 3"):
        upcycle_llava(dense, vlm_preset("ltdr", layers=(7,)))
    with pytest.raises(TypeError, match="not a Linear"):
        upcycle_llava(nn.Linear(2, 2), vlm_preset("ltdr"))
    odd = dense_llava()
    odd.model.language_model.layers[2].mlp = nn.Sequential()
    with pytest.raises(TypeError, match=r"layers\.2\.mlp is a Sequential"):
        upcycle_llava(odd, vlm_preset("ltdr"))
    assert not moe_layers(odd)
    by_attention = vlm_preset("ltdr", tail_rule=TailRule(kind="attention"))
    with pytest.raises(ValueError, match=r"'sdpa' attention does not have; .*'eager'"):
        upcycle_llava(dense, by_attention)
    assert not moe_layers(dense)
    sparse = upcycle_llava(dense, vlm_preset("ltdr"))
    with pytest.raises(ValueError, match="sparse already"):
        upcycle_llava(sparse, vlm_preset("ltdr"))
    with pytest.raises(ValueError, match="needs moe_spec="):
        LTDRLlavaForConditionalGeneration(LTDRLlavaConfig())


def test_no_vision_token_no_tail_and_no_nan():
    model = sparse_llava().train()
    batch = with_labels(questions())
    del batch["pixel_values"]
    output = model(**batch)
    output.loss.backward()
    assert torch.isfinite(output.loss)
    assert not any(routing.tail_mask_T.any() for routing in routings_of(model, batch))


@pytest.mark.slow
def test_compiled_whole():
    """Dense back end, one graph, also for another length."""
    model = use_expert_backend(sparse_llava(), "dense")
    batches = [questions(), {n: v[:1, :9] for n, v in questions(padding=None).items()}]
    batches[1]["pixel_values"] = questions()["pixel_values"][:1]
    with torch.no_grad():
        # transformers takes a lock in a model's first forward, which no graph can hold
        expected = [model(**batch).logits for batch in batches]
        compiled = torch.compile(model, fullgraph=True)
        for batch, logits in zip(batches, expected, strict=True):
            torch.testing.assert_close(compiled(**batch).logits, logits, atol=ATOL, rtol=0)
