"""Routers and selections that need text or side information, in every kind of vision-language
model: modality groups (table 11), shared experts (table 6), TASK, the selections of table 7 and the
ablations of table 3."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from gmoe_ltdr import balance_loss, collect_routing, moe_layers
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import convert_moe_llava, vlm_preset
from gmoe_ltdr.vlm.instruction_attention import instruction_scores
from gmoe_ltdr.vlm.transformers import upcycle_llava
from tests.vlm.fake_moe_llava import golden_host
from tests.vlm.goldens import golden
from tests.vlm.llavas import IMAGE, dense_llava, perturb_, questions, sparse_llava, with_labels

LANGUAGE, VISION, PADDING = Modality.LANGUAGE, Modality.VISION, Modality.PADDING
HOSTS = ("transformers", "native", "deepspeed")


def model_of(host, spec):
    """A model of that kind, and a batch for it: two rows with an image each, one of them padded."""
    if host == "transformers":
        return perturb_(upcycle_llava(dense_llava(), spec)), with_labels(questions())
    g = golden()
    names = ("input_ids", "attention_mask", "labels", "images")
    return convert_moe_llava(golden_host(), spec, host), {name: getattr(g, name) for name in names}


def plans_of(model, batch):
    with torch.no_grad(), collect_routing(model) as routings:
        model(**batch)
    return list(routings.values())


@pytest.mark.parametrize("host", HOSTS)
class TestEveryHost:
    def test_groups(self, host):
        """Image tokens have the first experts to themselves, words the others."""
        model, batch = model_of(host, vlm_preset("groups_v2Top1-t2Top1"))
        plans = plans_of(model, batch)
        assert len(plans) == 2
        for plan in plans:
            used = plan.dispatch_mask_TE
            assert not used[plan.of(VISION), 2:].any()
            assert not used[plan.of(LANGUAGE), :2].any()
            assert not used[plan.of(PADDING)].any()
            assert (plan.experts_per_token_T[~plan.of(PADDING)] == 1).all()

    def test_groups_with_dar_balance_words_alone(self, host):
        spec = vlm_preset("groups_v2Top1-t2Top1-DAR")
        model, batch = model_of(host, spec)
        for plan in plans_of(model, batch):
            (group,) = plan.balance_groups
            assert torch.equal(group.tokens_T, plan.of(LANGUAGE))

    @pytest.mark.parametrize("select", ["tail", "head"])
    def test_vtt_and_vht(self, host, select):
        """By hand: RPV above the row's mean over its image tokens, and the others."""
        rule = TailRule(select=select)
        model, batch = model_of(host, vlm_preset("ltdr", tail_rule=rule))
        for plan in plans_of(model.eval(), batch):
            rpv_BL = plan.probs_TE.var(1, correction=0).view(plan.shape_BL)
            vision_BL = plan.of(VISION).view(plan.shape_BL)
            for rpv, vision, selected in zip(
                rpv_BL, vision_BL, plan.tail_mask_T.view(plan.shape_BL), strict=True
            ):
                above = (rpv > rpv[vision].mean()) & vision
                assert 0 < above.sum() < vision.sum()
                assert torch.equal(selected, above if select == "tail" else vision & ~above)
            expected = torch.where(plan.tail_mask_T, 4, 2).masked_fill(plan.of(PADDING), 0)
            assert torch.equal(plan.experts_per_token_T, expected)

    def test_task(self, host):
        """In training its loss knows the task of each row; prediction needs none."""
        spec = vlm_preset(
            "baseline", router="task_supervised", balance="none",
            router_options={"task_weight": 1.0},
        )  # fmt: skip
        model, batch = model_of(host, spec)
        plans_of(model.eval(), batch)
        with pytest.raises(ValueError, match="has to know the task"):
            plans_of(model.train(), batch)
        set_image_info(model, domain_B=torch.tensor([1, 6]))
        for plan in plans_of(model, batch):
            label_T = torch.tensor([1, 6 % 4]).repeat_interleave(plan.shape_BL[1])
            real_T = ~plan.of(PADDING)
            expected = torch.nn.functional.cross_entropy(plan.logits_TE[real_T], label_T[real_T])
            torch.testing.assert_close(plan.router_losses["task_loss"], expected)

    @pytest.mark.parametrize(
        ("preset", "balanced", "tail"),
        [
            ("baseline", (LANGUAGE, VISION), False),
            ("dar", (LANGUAGE,), False),
            ("eea", (LANGUAGE, VISION), True),
            ("ltdr", (LANGUAGE,), True),
            ("no_language_balance", (VISION,), False),
            ("no_balance", (), False),
        ],
    )
    def test_table_3(self, host, preset, balanced, tail):
        """The balance loss worked out from the probabilities of the tokens that count."""
        spec = vlm_preset(preset)
        model, batch = model_of(host, spec)
        for plan in plans_of(model, batch):
            assert plan.tail_mask_T.any() == tail
            expected = 0.0
            if balanced:
                probs = plan.probs_TE[plan.of(*balanced)]
                share = torch.nn.functional.one_hot(probs.argmax(1), 4).float().mean(0)
                expected = float(0.01 * 4 * (share * probs.mean(0)).sum())
            assert float(balance_loss([plan], spec)) == pytest.approx(expected, abs=1e-7)


def test_shared_experts_see_every_token_that_is_no_padding():
    """Table 6. Upcycled with a routed output of zero, the shared expert is the dense network."""
    dense, batch = dense_llava(), questions()
    with torch.no_grad():
        expected = dense(**batch).logits
    spec = vlm_preset("deepseek_1x1.0+3x1.0")
    model = upcycle_llava(dense, spec)
    for layer in moe_layers(model).values():
        torch.nn.init.zeros_(layer.experts.fc2_weight)
    with torch.no_grad():
        found = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=0)


def test_a_host_has_the_experts_it_has():
    for name in ("deepseek_1x1.0+3x1.0", "groups_v4Top2-t4Top2"):
        with pytest.raises(ValueError, match="make a new sparse model with upcycle_llava"):
            convert_moe_llava(golden_host(), vlm_preset(name))


def test_a_task_is_that_of_the_forward_it_was_set_for():
    """TASK under checkpointing, with another forward and other tasks in between."""
    spec = vlm_preset("baseline", router="task_supervised", balance="none")
    spec = replace(spec, router_options={"task_weight": 1.0})
    batch = with_labels(questions())

    def gradients(checkpointing):
        model = perturb_(upcycle_llava(dense_llava(), spec)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        set_image_info(model, domain_B=torch.tensor([1, 2]))
        loss = model(**batch).loss
        set_image_info(model, domain_B=torch.tensor([3, 0, 3]))
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(False), gradients(True)
    assert expected.keys() == found.keys()
    for name, grad in found.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_every_beam_has_its_rows_embedding(options, use_cache):
    """CLUSTER: one embedding a row is told, and generation makes several rows of one."""
    centroids = torch.eye(3)
    settings = {"num_clusters": 3, "embedding_dim": 3}
    model = sparse_llava(preset="baseline", router="cluster", router_options=settings)
    for layer in moe_layers(model).values():
        layer.router.set_centroids_(centroids)
        torch.nn.init.normal_(layer.router.gate.weight, std=3.0)
    batch, embeddings = questions(), 2 * centroids[[0, 2]]
    generation = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, **options}
    generation["suppress_tokens"] = [IMAGE]
    set_image_info(model, embedding_BD=embeddings)
    found = model.generate(**batch, **generation).view(2, -1, 15)
    assert torch.equal(model.token_modality.image_info["embedding_BD"], embeddings)
    for row in range(2):
        set_image_info(model, embedding_BD=embeddings[row : row + 1])
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        assert torch.equal(model.generate(**alone, **generation), found[row])


class TestIAT:
    spec = vlm_preset("ltdr", tail_rule=TailRule(kind="attention", value=0.5))

    def test_scores_by_hand(self):
        """Two heads, which see: 0 and 1 are image tokens, 2 and 4 words of the instruction, 3 an
        answer."""
        rows = [
            [1.0, 0.0, 0.0, 0.0, 0.0],
            [0.5, 0.5, 0.0, 0.0, 0.0],
            [0.2, 0.4, 0.4, 0.0, 0.0],
            [0.9, 0.1, 0.0, 0.0, 0.0],
            [0.1, 0.2, 0.3, 0.2, 0.2],
        ]
        one = torch.tensor(rows)
        weights = torch.stack([one, torch.eye(5)]).unsqueeze(0)
        words = torch.tensor([[False, False, True, False, True]])
        # token 0: (.2 + .1) / 2 of the one head, 0 of the other; token 2: (.4 + .3) / 2 and 1 / 2;
        # tokens 3 and 4 are seen by the last word alone: (.2 + 0) / 2 and (.2 + 1) / 2
        expected = torch.tensor([[0.075, 0.15, 0.425, 0.1, 0.6]])
        torch.testing.assert_close(instruction_scores(weights, words), expected)
        longer = torch.cat([torch.zeros(1, 2, 5, 3), weights], -1)  # behind three in the cache
        torch.testing.assert_close(instruction_scores(longer, words, past=3), expected)
        nobody = instruction_scores(weights, torch.zeros_like(words))
        assert torch.equal(nobody, torch.zeros(1, 5))

    def eager(self, **overrides):
        dense = dense_llava()
        dense.set_attn_implementation("eager")
        return perturb_(upcycle_llava(dense, replace(self.spec, **overrides)))

    def test_the_tokens_that_are_attended_to_most(self):
        """Against the attentions that transformers hands out."""
        model, batch = self.eager().eval(), questions()
        with torch.no_grad(), collect_routing(model) as routings:
            attentions = model(**batch, output_attentions=True).attentions
        vision = batch["input_ids"] == IMAGE
        word = (batch["attention_mask"] == 1) & ~vision
        for index, plan in zip((0, 2), routings.values(), strict=True):
            tail = plan.tail_mask_T.view(plan.shape_BL)
            for row in range(2):
                after = word[row] & (torch.arange(11) > vision[row].nonzero().max())
                scores = attentions[index][row].mean(0)[after].mean(0)[vision[row]]
                best = vision[row].nonzero().flatten()[scores.topk(2).indices]
                assert tail[row].nonzero().flatten().tolist() == sorted(best.tolist())

    def test_generation_and_checkpointing(self):
        model, batch = self.eager(), questions()
        options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
        cached = model.generate(**batch, **options)
        assert torch.equal(cached, model.generate(**batch, **options, use_cache=False))
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(cached, model.generate(**batch, **options, **static))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
        found = []
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            loss = model.train()(**with_labels(batch)).loss
            model(**with_labels(questions(seed=7, images=1)))
            loss.backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        for name, grad in found[0].items():
            torch.testing.assert_close(grad, found[1][name], msg=name)

    def test_generated_words_do_not_ask(self):
        """Without a cache the words of the answer are in the same forward as the question's."""
        model, told = self.eager(), []
        for layer in moe_layers(model).values():
            layer.router.register_forward_hook(
                lambda _router, _inputs, plan: told.append(plan.tail_mask_T.view(2, -1))
            )
        options = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": [IMAGE]}
        for seed in range(4):
            told.clear()
            model.generate(**questions(seed=seed), **options, use_cache=False)
            prompt, later = told[:2], told[2:]
            assert any(mask.any() for mask in prompt)
            assert len(later) == 2 * 5
            for number, mask in enumerate(later):
                assert torch.equal(mask[:, :11], prompt[number % 2])

    def test_saved_and_loaded(self, tmp_path):
        from gmoe_ltdr.vlm.transformers import LTDRLlavaForConditionalGeneration

        model, batch = self.eager().eval(), questions()
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="load or make the model with attn_implementation"):
            LTDRLlavaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="sdpa")
        twin = LTDRLlavaForConditionalGeneration.from_pretrained(
            tmp_path, attn_implementation="eager"
        )
        assert torch.equal(twin(**batch).logits, model(**batch).logits)
        twin.set_attn_implementation("sdpa")
        with pytest.raises(ValueError, match="were not handed out"):
            twin(**batch)

    def test_tasks_can_be_told_all_the_same(self):
        model = self.eager()
        set_image_info(model, domain_B=torch.tensor([1, 2]))
        assert model.token_modality.image_info["domain_B"].tolist() == [1, 2]
        assert sparse_llava().token_modality.image_info == {}
