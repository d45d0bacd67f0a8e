"""MoE-LLaVA's own classes, converted in place: golden logits, names, contract, repaired defects."""

import sys

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from gmoe_ltdr import collect_routing, moe_layers, use_expert_backend
from gmoe_ltdr.image_info import set_image_info
from gmoe_ltdr.routing import Modality
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.vlm import spliced_modality_map, vlm_preset
from gmoe_ltdr.vlm.deepspeed_stub import deepspeed_stub
from gmoe_ltdr.vlm.moe_llava import convert_moe_llava, load_moe_llava
from tests.distributed import run_ranks
from tests.vlm.fake_moe_llava import FakeMoE, FakeMoELlava, golden_host, golden_state
from tests.vlm.goldens import golden

ATOL = 1e-5
PLAIN = vlm_preset("baseline")
LTDR = vlm_preset("ltdr", tail_rule=TailRule(eval_scope="batch"))  # as the prototype's


def host(config=None, **moe_changes):
    """The golden weights where they fit, in a host whose MoE settings differ."""
    values = {**golden().config, **(config or {})}
    values["moe"] = {**values["moe"], **moe_changes}
    torch.manual_seed(0)
    model = FakeMoELlava(values, golden().clip)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state = {n: v for n, v in golden_state(model).items() if shapes.get(n) == v.shape}
    model.load_state_dict(state, strict=not moe_changes)
    return model.eval()


def golden_output(model):
    g = golden()
    with torch.no_grad():
        return model(g.input_ids, g.attention_mask, g.labels, g.images)


def assert_golden(found, expected):
    real = golden().real
    torch.testing.assert_close(found[real], expected[real], atol=ATOL, rtol=0)


class TestGolden:
    def test_the_fake_host_is_like_the_real_one(self):
        assert_golden(golden_output(golden_host()).logits, golden().logits)

    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    def test_ltdr_off(self, backend):
        model = convert_moe_llava(golden_host(), PLAIN, backend)
        assert_golden(golden_output(model).logits, golden().logits)

    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    def test_ltdr_on(self, backend):
        model = convert_moe_llava(golden_host(), LTDR, backend)
        output = golden_output(model)
        assert_golden(output.logits, golden().ltdr_logits)
        for found, expected in zip(output.moe_losses, golden().ltdr_aux, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    def test_padding_counted_as_the_host_does(self):
        """With padding as language, even the balance losses are the unconverted host's."""
        spec = vlm_preset("baseline", router_options={"padding": "language"})
        plain = golden_output(golden_host())
        output = golden_output(convert_moe_llava(golden_host(), spec))
        torch.testing.assert_close(output.logits, plain.logits, atol=ATOL, rtol=0)
        torch.testing.assert_close(output.loss, plain.loss)
        for found, expected in zip(output.moe_losses, plain.moe_losses, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    def test_two_evaluations_agree(self):
        model = convert_moe_llava(golden_host(), LTDR)
        assert torch.equal(golden_output(model).logits, golden_output(model).logits)


class TestNames:
    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    @pytest.mark.parametrize("residual", [False, True])
    def test_the_state_dict_stays(self, backend, residual):
        model = host(use_residual=residual)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        parameters = [name for name, _ in model.named_parameters()]
        convert_moe_llava(model, LTDR, backend)
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert {name for name, _ in model.named_parameters()} == set(parameters)
        fresh = host(use_residual=residual)
        fresh.load_state_dict(after)  # strict

    def test_layers_are_found_and_routings_collected(self):
        for backend, suffix in (("native", ""), ("deepspeed", ".deepspeed_moe.gate")):
            model = convert_moe_llava(golden_host(), LTDR, backend)
            with collect_routing(model) as routings:
                golden_output(model)
            names = [f"model.layers.{i}.mlp" for i in (0, 2)]
            assert list(routings) == [name + suffix for name in names]
            assert list(moe_layers(model)) == (names if backend == "native" else [])
            for routing in routings.values():
                assert torch.equal(routing.modality_T.view(2, -1), golden().modality)

    def test_train_modules_filter_by_name(self):
        model = convert_moe_llava(golden_host(), LTDR).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(k in name for k in ("gate_proj", "up_proj", "wg")))
        g = golden()
        model(g.input_ids, g.attention_mask, g.labels, g.images).loss.backward()
        moved = {name for name, p in model.named_parameters() if p.grad is not None}
        experts = "deepspeed_moe.experts.deepspeed_experts"
        assert f"model.layers.0.mlp.{experts}.3.up_proj.weight" in moved
        assert "model.layers.2.mlp.deepspeed_moe.gate.wg.weight" in moved
        assert not any("down_proj" in name for name in moved)

    def test_no_parameter_belongs_to_a_group_of_ranks_any_more(self):
        model = convert_moe_llava(golden_host(), LTDR)
        assert not any(hasattr(p, "allreduce") for p in model.parameters())
        kept = convert_moe_llava(golden_host(), LTDR, "deepspeed")
        assert any(hasattr(p, "allreduce") for p in kept.parameters())

    def test_wrapped_linears_as_lora_makes_them(self):
        """Adapters replace modules by name after the conversion: expert layers and the gate."""

        class Adapted(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base_layer = base.requires_grad_(False)
                self.lora_A = nn.Linear(base.in_features, 2, bias=False)
                self.lora_B = nn.Linear(2, base.out_features, bias=False)

            def forward(self, x):
                return self.base_layer(x) + self.lora_B(self.lora_A(x))

        model = convert_moe_llava(golden_host(), LTDR)
        for layer in moe_layers(model).values():
            layer.deepspeed_moe.gate.wg = Adapted(layer.deepspeed_moe.gate.wg)
            for expert in layer.experts.deepspeed_experts:
                expert.up_proj = Adapted(expert.up_proj)
        g = golden()
        loss = model.train()(g.input_ids, g.attention_mask, g.labels, g.images).loss
        loss.backward()
        adapters = [p for n, p in model.named_parameters() if "lora_" in n]
        assert len(adapters) == 2 * 2 * 5
        assert all(p.grad.abs().sum() > 0 for p in adapters)


PROMPTS = {
    "two": [[5, -200, 6, 7, 8], [-200, 9, 0, 0, 0]],
    "several": [[-200, 5, -200, 6], [7, -200, 0, 0]],
    "none in one": [[5, 6, 7], [-200, 8, 0]],
}


class TestSplicing:
    @pytest.mark.parametrize("which", PROMPTS)
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("limit", [None, 20])
    @pytest.mark.parametrize("with_labels", [False, True])
    @pytest.mark.parametrize("with_mask", [False, True])
    def test_the_map_and_an_unchanged_result(self, which, side, limit, with_labels, with_mask):
        """Against the layout worked out id by id; inside an image is where 20 cuts."""
        ids = torch.tensor(PROMPTS[which])
        mask = (ids != 0).long() if with_mask else None
        labels = ids.masked_fill((ids < 6) | (ids == 8), -100) if with_labels else None
        num_images = int((ids == -200).sum()) + (which == "none in one")
        images = torch.randn(num_images, 3, 16, 16)
        config = {"tokenizer_padding_side": side, "tokenizer_model_max_length": limit}
        model = host(config)
        arguments = (ids, None, mask, None, labels, images)
        expected = model.prepare_inputs_labels_for_multimodal(*arguments)
        convert_moe_llava(model, LTDR)
        found = model.prepare_inputs_labels_for_multimodal(*arguments)
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours is None) == (theirs is None)
            if theirs is not None:
                assert torch.equal(ours, theirs)
                assert ours.dtype == theirs.dtype
        told = model.prepare_inputs_labels_for_multimodal.take()
        layout = spliced_modality_map(
            ids, mask, [16] * num_images, max_length=limit, padding_side=side
        )
        assert torch.equal(told.modality_BL, layout)
        if with_labels:  # what a router for whole sequences may look at
            prompt = (expected[5] == -100) & (layout == int(Modality.LANGUAGE))
            assert torch.equal(told.instruction_BL, prompt)

    def test_text_alone(self):
        model = convert_moe_llava(golden_host(), LTDR)
        ids, mask = torch.tensor([[3, 4, 5], [6, 7, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
        with collect_routing(model) as routings:
            model(ids, mask, ids)
        first = next(iter(routings.values()))
        assert first.modality_T.tolist() == [0, 0, 0, 0, 0, int(Modality.PADDING)]

    def test_embeddings_that_did_not_come_through_splicing(self):
        model = convert_moe_llava(golden_host(), LTDR)
        embeds = torch.randn(1, 4, 64)
        with pytest.raises(ValueError, match=r"with model\.token_modality\.using"):
            model(inputs_embeds=embeds)
        tokens = torch.tensor([[0, 1, 1, 0]], dtype=torch.uint8)
        with model.token_modality.using(tokens), collect_routing(model) as routings:
            model(inputs_embeds=embeds)
        assert next(iter(routings.values())).modality_T.tolist() == [0, 1, 1, 0]


def batch_of(num_rows, seed=0):
    """Rows with one image each, with different texts, none padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 120, (num_rows, 7), generator=generator)
    ids[:, 2] = -200
    images = torch.randn(num_rows, 3, 16, 16, generator=generator)
    return ids, torch.ones_like(ids), ids.masked_fill(ids == -200, -100), images


class TestRepairs:
    def test_three_rows(self):
        """TV-V6: the host takes a dense layer's output of three rows for a triple."""
        batch = batch_of(3)
        repaired = convert_moe_llava(golden_host(), vlm_preset("ltdr"))
        with torch.no_grad():
            logits = repaired(*batch).logits
            for row in range(3):
                alone = repaired(*(part[row : row + 1] for part in batch)).logits
                torch.testing.assert_close(logits[row : row + 1], alone, atol=ATOL, rtol=0)
            # without labels, or the "loss" of a whole row would not even add up
            ids, mask, _, images = batch
            unrepaired = convert_moe_llava(golden_host(), vlm_preset("ltdr"), repair=())
            assert (unrepaired(ids, mask, None, images).logits - logits).abs().max() > 0.01

    def gradients(self, model, batch, between=None):
        model.zero_grad()
        output = model(*batch)
        if between is not None:
            between()
        output.loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing_changes_nothing(self, reentrant):
        """TV-V5, without a way to hand the layers anything but their inputs."""
        model = convert_moe_llava(golden_host(), vlm_preset("ltdr")).train()
        model.model.embed_tokens.weight.requires_grad_(True)
        model.model.reentrant = reentrant
        batch, other = batch_of(2), batch_of(4, seed=1)
        same_shape = batch_of(2, seed=2)
        same_shape[0][:, 2], same_shape[0][:, 3] = 5, -200
        expected = self.gradients(model, batch)
        model.model.checkpointing = True

        def between():
            model(*other)
            model(*same_shape)

        for way in (None, between):
            found = self.gradients(model, batch, way)
            assert found.keys() == expected.keys()
            for name, grad in found.items():
                torch.testing.assert_close(grad, expected[name], atol=0, rtol=0, msg=name)
        for layer in model.model.layers:  # what was remembered does not pile up
            assert len(layer.forward._seen) <= 2

    def test_the_balance_loss_has_a_gradient_under_checkpointing(self):
        found = []
        for repair in ((), ("aux_checkpointing",)):
            model = convert_moe_llava(golden_host(), PLAIN, repair=repair).train()
            model.model.checkpointing = True
            model.router_aux_loss_coef = 10.0
            losses = model(*batch_of(2)).moe_losses
            found.append([loss.requires_grad for loss in losses])
        assert found == [[False, False], [True, True]]  # the defect, and its repair


class TestGeneration:
    def test_the_cache_changes_nothing(self):
        """TV-V2, with a batch that is padded on the left."""
        model = convert_moe_llava(host({"tokenizer_padding_side": "left"}), vlm_preset("ltdr"))
        ids, mask, _, images = batch_of(2)
        mask[1, :2], ids[1, 1], ids[1, 2], ids[1, 3] = 0, 0, 5, -200
        cached = model.generate(ids, mask, images, 6)
        assert torch.equal(cached, model.generate(ids, mask, images, 6, use_cache=False))

    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    def test_a_prompt_decides_for_what_follows_it(self, backend):
        """INSTRUCT: the words of the prompt choose, and the cache carries their choice along."""
        spec = vlm_preset("baseline", router="instruct")
        model = convert_moe_llava(host({"tokenizer_padding_side": "left"}), spec, backend)
        ids, mask, _, images = batch_of(2)
        mask[1, :2], ids[1, 1], ids[1, 2], ids[1, 3] = 0, 0, 5, -200

        def decided(routings):
            return [r.logits_TE.view(*r.shape_BL, -1)[:, -1] for r in routings.values()]

        with torch.no_grad():
            with collect_routing(model) as routings:
                step = model(ids, mask, images=images, use_cache=True)
            prompt = decided(routings)
            assert not torch.equal(prompt[0][0], prompt[0][1])
            mask = model.mask_of(ids, mask, images)
            swapped = torch.tensor([1, 0])
            for rows in (torch.tensor([0, 1]), swapped, torch.tensor([0, 1])):
                past = model.reorder(step.past_key_values, rows)
                prompt = [logits[rows] for logits in prompt]
                mask = mask[rows]
                with collect_routing(model) as routings:
                    step = model(
                        torch.tensor([[3], [4]]), mask, images=images, past_key_values=past,
                        use_cache=True,
                    )  # fmt: skip
                for found, expected in zip(decided(routings), prompt, strict=True):
                    assert torch.equal(found, expected)
            past = step.past_key_values[:4]  # as one that another model has filled
            with pytest.raises(ValueError, match="does not say what its prompt decided"):
                model(torch.tensor([[3], [4]]), mask, images=images, past_key_values=past)

    def test_a_decoding_step_is_language(self):
        model = convert_moe_llava(golden_host(), LTDR)
        with torch.no_grad(), collect_routing(model) as routings:
            model(torch.tensor([[3], [4], [5]]))
        for routing in routings.values():
            assert routing.modality_T.tolist() == [0, 0, 0]
            assert routing.experts_per_token_T.tolist() == [2, 2, 2]


class TestLayers:
    @pytest.mark.parametrize("k", [1, 2])
    @pytest.mark.parametrize("residual", [False, True])
    def test_off_equals_the_host(self, k, residual):
        spec = vlm_preset("baseline", top_k=k, router_options={"padding": "language"})
        expected = golden_output(host(use_residual=residual, top_k_experts=k))
        for backend in ("native", "deepspeed"):
            model = host(use_residual=residual, top_k_experts=k)
            output = golden_output(convert_moe_llava(model, spec, backend))
            torch.testing.assert_close(output.logits, expected.logits, atol=ATOL, rtol=0)
            torch.testing.assert_close(output.loss, expected.loss)

    def test_the_three_tuple(self):
        model = convert_moe_llava(golden_host(), LTDR)
        layer = next(iter(moe_layers(model).values()))
        x = torch.randn(1, 6, 64)
        with model.token_modality.using(torch.tensor([[0, 1, 1, 1, 0, 2]], dtype=torch.uint8)):
            out, loss, counts = layer(x)
        assert out.shape == x.shape
        assert loss.shape == ()
        assert counts.device.type == "cpu"
        assert int(counts.sum()) == 5  # padding chooses nobody

    def test_layers_may_have_different_numbers_of_experts(self):
        model = host(num_experts=[4, 2])
        convert_moe_llava(model, vlm_preset("ltdr", top_k=1))
        assert [layer.spec.num_experts for layer in moe_layers(model).values()] == [4, 2]
        assert torch.isfinite(golden_output(model).loss)

    def test_the_weight_of_the_balance_loss_is_the_hosts(self):
        model = host(router_aux_loss_coef=0.5)
        output = golden_output(convert_moe_llava(model, LTDR))
        for found, expected in zip(output.moe_losses, golden().ltdr_aux, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)

    def test_a_router_with_losses_of_its_own(self):
        """They reach the host's loss once, whatever it multiplies with."""
        spec = vlm_preset("baseline", router="dynamic", num_experts=4, balance="none", top_k=1)
        model = convert_moe_llava(golden_host(), spec).train()
        g = golden()
        with collect_routing(model) as routings:
            output = model(g.input_ids, g.attention_mask, g.labels, g.images)
        own = sum(loss for r in routings.values() for loss in r.router_losses.values())
        assert own > 0
        added = model.router_aux_loss_coef * sum(output.moe_losses)
        torch.testing.assert_close(added, own)
        wg = "model.layers.0.mlp.deepspeed_moe.gate.wg.weight"
        assert not dict(model.named_parameters())[wg].requires_grad  # it decides nothing now

    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    def test_own_losses_count_where_the_balance_loss_does_not(self, backend):
        """router_aux_loss_coef=0 says something of the balance loss, and nothing of the tasks'."""
        spec = vlm_preset("baseline", router="task_supervised")
        g = golden()
        batch = (g.input_ids, g.attention_mask, g.labels, g.images)
        model = convert_moe_llava(host(router_aux_loss_coef=0), spec, backend).train()
        set_image_info(model, domain_B=torch.tensor([0, 1]))
        with collect_routing(model) as routings:
            output = model(*batch)
        own = sum(loss for r in routings.values() for loss in r.router_losses.values())
        assert own > 0
        plain = convert_moe_llava(host(router_aux_loss_coef=0), PLAIN, backend).train()
        alone = plain(*batch)
        assert sum(alone.moe_losses) == 0
        # tasks move no token, so this is the same cross-entropy
        torch.testing.assert_close(output.loss - own, alone.loss)

    def test_back_ends_of_modules(self):
        model = convert_moe_llava(golden_host(), LTDR)
        use_expert_backend(model, "dense")
        assert_golden(golden_output(model).logits, golden().ltdr_logits)
        with pytest.raises(ValueError, match="modules of the host"):
            use_expert_backend(model, "grouped")

    def test_routes_as_newer_deepspeed_wants_them(self):
        """The seven-tuple of DeepSpeed 0.19, against the masks of 0.9."""
        model = convert_moe_llava(golden_host(), LTDR, "deepspeed")
        gate = model.model.layers[0].mlp.deepspeed_moe.gate
        gate._flag_names = ["sparse_routes", "use_tutel"]
        x = torch.randn(6, 64)
        tokens = torch.tensor([[0, 1, 1, 1, 0, 2]], dtype=torch.uint8)
        with model.token_modality.using(tokens):
            loss, combine, dispatch, counts = gate(x, None)
            found = gate(x, None, True, False)
            with pytest.raises(NotImplementedError, match="use_tutel=False"):
                gate(x, None, True, True)
        aux, capacity, num_experts, experts, slots, weights, counted = found
        assert (int(capacity), num_experts) == (combine.shape[2], 4)
        rebuilt = torch.zeros_like(combine)
        for choice in range(len(experts)):
            for token in range(6):
                if experts[choice, token] >= 0:
                    place = (token, int(experts[choice, token]), int(slots[choice, token]))
                    rebuilt[place] = weights[choice, token]
        assert torch.equal(rebuilt, combine)
        assert torch.equal(rebuilt > 0, dispatch)
        assert (experts[:, 5] == -1).all()
        assert torch.equal(aux, loss)
        assert torch.equal(counted, counts)

    def test_tokens_that_were_not_announced(self):
        model = convert_moe_llava(golden_host(), LTDR, "deepspeed")
        gate = model.model.layers[0].mlp.deepspeed_moe.gate
        with pytest.raises(RuntimeError, match="6 tokens to route, but announced are None"):
            gate(torch.randn(6, 64))


def capacity_of_rank():
    """Each rank has other tokens; all need room for the fullest expert of any."""
    rank = torch.distributed.get_rank()
    model = convert_moe_llava(golden_host(), LTDR, "deepspeed")
    moe = model.model.layers[0].mlp.deepspeed_moe
    moe.ep_size, moe.ep_group = 2, torch.distributed.group.WORLD
    length = 20 if rank else 3
    tokens = torch.zeros(1, length, dtype=torch.uint8)
    x = torch.ones(length, 64)  # all choose the same two experts
    with model.token_modality.using(tokens):
        _, combine, _, _ = moe.gate(x)
    return combine.shape[2]


@pytest.mark.slow
def test_ranks_agree_on_the_capacity():
    assert run_ranks(capacity_of_rank, 2) == [20, 20]


class TestWithoutDeepSpeed:
    def test_the_stub(self):
        assert "deepspeed" not in sys.modules
        with deepspeed_stub():
            from deepspeed.moe.layer import MoE
        assert "deepspeed" not in sys.modules
        model = FakeMoELlava(golden().config, golden().clip, moe_class=MoE)
        model.load_state_dict(golden_state(model))
        with pytest.raises(RuntimeError, match="convert_moe_llava"):
            golden_output(model)
        with pytest.raises(ValueError, match="made without DeepSpeed"):
            convert_moe_llava(model, PLAIN, "deepspeed")
        convert_moe_llava(model, PLAIN)
        assert_golden(golden_output(model.eval()).logits, golden().logits)

    def test_residual_experts_from_the_stub(self):
        with deepspeed_stub():
            from deepspeed.moe.layer import MoE
        config = {**golden().config, "moe": {**golden().config["moe"], "use_residual": True}}
        models = []
        for moe_class in (FakeMoE, MoE):
            torch.manual_seed(0)
            models.append(FakeMoELlava(config, golden().clip, moe_class=moe_class))
        assert models[0].state_dict().keys() == models[1].state_dict().keys()
        models[1].load_state_dict(models[0].state_dict())
        outputs = [golden_output(convert_moe_llava(m.eval(), PLAIN)) for m in models]
        assert torch.equal(outputs[0].logits, outputs[1].logits)

    def test_loading(self, tmp_path):
        class Loadable(FakeMoELlava):
            @classmethod
            def from_pretrained(cls, folder):
                assert folder == tmp_path
                from deepspeed.moe.layer import MoE  # as the host's module does

                model = cls(golden().config, golden().clip, moe_class=MoE)
                model.load_state_dict(golden_state(model))
                model.model.image_tower.is_loaded = False
                model.model.image_tower.load_model = lambda: loaded.append(True)
                return model

        loaded = []
        model = load_moe_llava(tmp_path, PLAIN, cls=Loadable)
        assert loaded == [True]
        assert_golden(golden_output(model).logits, golden().logits)
        with pytest.raises(ValueError, match=r"no readable config\.json"):
            load_moe_llava(tmp_path, PLAIN)
        (tmp_path / "config.json").write_text('{"model_type": "llava"}')
        with pytest.raises(ValueError, match="model_type 'llava'"):
            load_moe_llava(tmp_path, PLAIN)
        (tmp_path / "config.json").write_text('{"model_type": "moe_llava_phi"}')
        with pytest.raises(ImportError, match="put its repository on PYTHONPATH"):
            load_moe_llava(tmp_path, PLAIN)


class TestNumbersOfTheHost:
    """Number of experts and top-k: a preset's name takes the model's, a spec its own, aloud."""

    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    @pytest.mark.parametrize("k", [1, 2])
    def test_a_presets_name(self, backend, k, caplog):
        expected = golden_output(host(top_k_experts=k)).logits
        model = convert_moe_llava(host(top_k_experts=k), "baseline", backend)
        assert_golden(golden_output(model).logits, expected)
        assert model.config.moe_spec["top_k"] == k
        assert not [r for r in caplog.records if r.levelname == "WARNING"]

    def test_the_config_says_it_where_no_gate_does(self, tmp_path):
        with deepspeed_stub():
            from deepspeed.moe.layer import MoE

        class Loadable(FakeMoELlava):
            @classmethod
            def from_pretrained(cls, _folder):
                values = {**golden().config, "moe": {**golden().config["moe"], "top_k_experts": 1}}
                return cls(values, golden().clip, moe_class=MoE)

        model = load_moe_llava(tmp_path, "baseline", cls=Loadable)
        assert [layer.spec.top_k for layer in moe_layers(model).values()] == [1, 1]

    def test_a_spec_that_says_otherwise(self, caplog):
        model = convert_moe_llava(host(top_k_experts=1), vlm_preset("baseline", num_experts=6))
        assert [layer.spec.top_k for layer in moe_layers(model).values()] == [2, 2]
        first, second = (r.getMessage() for r in caplog.records if r.levelname == "WARNING")
        assert "the spec's top_k=2 replaces the model's top_k_experts=1" in first
        assert "the spec's num_experts=6 is not used: the model's layers have 4, 4" in second
        caplog.clear()
        convert_moe_llava(golden_host(), vlm_preset("baseline", router="dynamic", top_k=1))
        assert not any("top_k" in r.getMessage() for r in caplog.records)  # it has none


class TestRefusals:
    @pytest.mark.parametrize("backend", ["native", "deepspeed"])
    def test_all_layers_are_looked_at_before_one_is_changed(self, backend):
        model = host(num_experts=[4, 1], top_k_experts=1)
        before = [layer.mlp for layer in model.model.layers]
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        state = torch.get_rng_state()
        with pytest.raises(ValueError, match=r"layer 2: .*num_experts=1"):
            convert_moe_llava(model, "groups_v2Top1-t2Top1", backend)
        assert torch.equal(torch.get_rng_state(), state)
        assert [layer.mlp for layer in model.model.layers] == before
        assert [name for name, p in model.named_parameters() if not p.requires_grad] == frozen
        convert_moe_llava(model, "baseline", backend)
        assert torch.isfinite(golden_output(model).loss)

    def test_embeddings_of_another_width_than_the_gate(self):
        options = {"num_clusters": 4, "embedding_dim": 8}
        spec = vlm_preset("baseline", router="cluster", router_options=options)
        with pytest.raises(ValueError, match="embeddings of width 8, but the model's gate takes"):
            convert_moe_llava(golden_host(), spec)
        own = vlm_preset("baseline", router="cluster", router_options=options, gate="cosine")
        model = convert_moe_llava(golden_host(), own)
        for layer in moe_layers(model).values():
            layer.router.set_centroids_(torch.eye(8)[:4])
        set_image_info(model, embedding_BD=torch.eye(8)[:2])
        assert torch.isfinite(golden_output(model).loss)

    def test_no_model_of_that_kind(self):
        with pytest.raises(ValueError, match=r"Linear is no MoE-LLaVA .*upcycle_llava"):
            convert_moe_llava(nn.Linear(2, 2), PLAIN)

    def test_no_sparse_layer(self):
        model = host(moe_layers_idx=[], num_experts=[])
        with pytest.raises(ValueError, match="initialize_moe_modules"):
            convert_moe_llava(model, PLAIN)

    def test_twice(self):
        model = convert_moe_llava(golden_host(), PLAIN)
        with pytest.raises(ValueError, match="converted already"):
            convert_moe_llava(model, LTDR)

    def test_experts_on_several_ranks(self):
        model = golden_host(ep_size=2)
        with pytest.raises(NotImplementedError, match=r"gather the experts .*backend='deepspeed'"):
            convert_moe_llava(model, PLAIN)

    def test_tutel(self):
        model = golden_host()
        model.model.layers[2].mlp.deepspeed_moe.use_tutel = True
        with pytest.raises(NotImplementedError, match="layer 2 dispatches with Tutel"):
            convert_moe_llava(model, PLAIN)
        assert not moe_layers(model)

    def test_values(self):
        with pytest.raises(ValueError, match="'megatron' is neither 'native' nor 'deepspeed'"):
            convert_moe_llava(golden_host(), PLAIN, "megatron")
        with pytest.raises(ValueError, match="may hold aux_checkpointing, batch_of_three"):
            convert_moe_llava(golden_host(), PLAIN, repair=("prints",))
        with pytest.raises(ValueError, match="top_k=3 must lie between 1 and num_experts=2"):
            convert_moe_llava(host(num_experts=[4, 2]), vlm_preset("ltdr", top_k=3))
        with pytest.raises(ValueError, match="upcycle_llava"):
            convert_moe_llava(golden_host(), vlm_preset("ltdr", shared_experts=1))
        by_attention = vlm_preset("ltdr", tail_rule=TailRule(kind="attention"))
        with pytest.raises(ValueError, match="attention from text to image tokens"):
            convert_moe_llava(golden_host(), by_attention)
