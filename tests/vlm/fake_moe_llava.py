"""A model with the shape of MoE-LLaVA: its names, its splicing, its three-tuples and its defects.

Written from the contract, around the attention of transformers' StableLM and its CLIP. Forwards are
set per instance, layers return a list of losses as their last output, and a layer is taken for
sparse when its network's output has length three, as in the original.
"""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionConfig, CLIPVisionModel, DynamicCache, StableLmConfig
from transformers.models.stablelm.modeling_stablelm import StableLmModel

from tests.vlm.goldens import golden

IMAGE_TOKEN = -200


class FakeGate(nn.Module):
    """DeepSpeed's top-k gate with the second expert by argmax, dropping nothing: (T, E, C)."""

    def __init__(self, dim, num_experts, k):
        super().__init__()
        self.wg = nn.Linear(dim, num_experts, bias=False)
        self.k = k

    def forward(self, input, used_token=None, use_tutel=False):
        probs = self.wg(input.float()).softmax(-1)
        num_experts = probs.shape[1]
        chosen = torch.zeros_like(probs, dtype=torch.bool)
        for _ in range(self.k):
            best = probs.masked_fill(chosen, -1).argmax(-1)
            chosen = chosen | F.one_hot(best, num_experts).bool()
        weights = probs * chosen
        if self.k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        first = F.one_hot(probs.argmax(-1), num_experts).float()
        aux = num_experts * (first.mean(0) * probs.mean(0)).sum()
        slot = chosen.cumsum(0) - 1
        dispatch = F.one_hot(slot.clamp(min=0), len(input)).bool() & chosen.unsqueeze(-1)
        return aux, weights.unsqueeze(-1) * dispatch, dispatch, first.sum(0).cpu()


class FakeExperts(nn.Module):
    def __init__(self, expert, num_experts):
        super().__init__()
        copies = [copy.deepcopy(expert) for _ in range(num_experts)]
        self.deepspeed_experts = nn.ModuleList(copies)
        for parameter in self.parameters():
            parameter.allreduce = False
            parameter.group_name = "ep_size_1"

    def forward(self, rows_ECD):
        return torch.stack([e(r) for e, r in zip(self.deepspeed_experts, rows_ECD, strict=True)])


class FakeMOELayer(nn.Module):
    def __init__(self, gate, experts):
        super().__init__()
        self.gate, self.experts = gate, experts
        self.ep_size, self.ep_group = 1, None
        self.use_tutel = False

    def forward(self, hidden, used_token):
        tokens = hidden.reshape(-1, hidden.shape[-1])
        self.l_aux, combine, dispatch, self.exp_counts = self.gate(tokens, used_token)
        rows = torch.einsum("sec,sm->ecm", dispatch.type_as(tokens), tokens)
        out = torch.einsum("sec,ecm->sm", combine.type_as(tokens), self.experts(rows))
        return out.reshape(hidden.shape)


class FakeMoE(nn.Module):
    def __init__(self, dim, expert, num_experts, k, use_residual=False, ep_size=1):
        super().__init__()
        self.deepspeed_moe = FakeMOELayer(
            FakeGate(dim, num_experts, k), FakeExperts(expert, num_experts)
        )
        self.ep_size, self.use_residual = ep_size, use_residual
        if use_residual:
            self.mlp = expert
            self.coefficient = nn.Linear(dim, 2)

    def forward(self, hidden, used_token=None):
        out = self.deepspeed_moe(hidden, used_token)
        if self.use_residual:
            share = self.coefficient(hidden).softmax(-1)
            out = out * share[..., :1] + self.mlp(hidden) * share[..., 1:]
        return out, self.deepspeed_moe.l_aux, self.deepspeed_moe.exp_counts


class FakeTower(nn.Module):
    is_loaded = True

    def __init__(self, config):
        super().__init__()
        self.image_tower = CLIPVisionModel(config)

    @torch.no_grad()
    def forward(self, images):
        hidden = self.image_tower(images, output_hidden_states=True).hidden_states
        return hidden[-2][:, 1:]


class FakeProjector(nn.Module):
    def __init__(self, vision_dim, dim):
        super().__init__()
        self.image_spatial_proj = nn.Sequential(
            nn.Linear(vision_dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )


def layer_forward(layer):
    def forward(hidden, attention_mask=None, position_embeddings=None, cache=None):
        residual = hidden
        name = "cache" if "cache" in inspect.signature(type(layer.self_attn).forward).parameters \
            else "past_key_values"  # fmt: skip
        attended, _ = layer.self_attn(
            layer.input_layernorm(hidden),
            attention_mask=attention_mask,
            position_embeddings=position_embeddings,
            **{name: cache},
        )
        hidden = residual + attended
        residual = hidden
        hidden = layer.mlp(layer.post_attention_layernorm(hidden))
        losses = []
        if len(hidden) == 3:  # the defect: so is a dense output of three rows
            losses.append(hidden[1])
            hidden = hidden[0]
        return residual + hidden, losses

    return forward


def as_cache(past):
    """The host's ((keys, values) of each layer) as transformers' object, and back."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past or ()):
        cache.update(keys, values, index)
    return cache


def decoder_forward(decoder):
    def forward(
        input_ids=None, attention_mask=None, past_key_values=None, inputs_embeds=None,
        use_cache=False,
    ):  # fmt: skip
        hidden = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length, _ = hidden.shape
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        assert past_key_values is None or len(past_key_values) == len(decoder.layers)
        cache = as_cache(past_key_values) if use_cache else None
        if attention_mask is None:
            attention_mask = torch.ones(batch, past + length, dtype=torch.bool)
        real = attention_mask.bool()
        positions = (real.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        visible = torch.ones(past + length, past + length).tril().bool()[past:]
        visible = visible & real[:, None, None, :]
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        rotary = decoder.rotary_emb(hidden, positions)
        all_losses = []
        for layer in decoder.layers:
            if decoder.checkpointing and decoder.training:
                outputs = checkpoint(layer, hidden, mask, rotary, use_reentrant=decoder.reentrant)
            else:
                outputs = layer(hidden, mask, rotary, cache)
            hidden = outputs[0]
            all_losses.extend(outputs[-1])
        return SimpleNamespace(
            last_hidden_state=decoder.norm(hidden),
            past_key_values=tuple((one.keys, one.values) for one in cache.layers)
            if use_cache
            else None,
            moe_losses=all_losses,
        )

    return forward


class FakeMoELlava(nn.Module):
    """See the module's docstring.

    Args:
        config: MoE-LLaVA's configuration as a dictionary.
        clip: That of its image tower.
        moe_class: DeepSpeed's layer.
    """

    def __init__(self, config: dict, clip: dict, moe_class=FakeMoE, **moe_options):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.router_aux_loss_coef = config["moe"]["router_aux_loss_coef"]
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "use_qkv_bias")  # fmt: skip
        text = StableLmConfig(
            **{name: config[name] for name in names}, layer_norm_eps=config["norm_eps"],
            partial_rotary_factor=config["rope_pct"], rope_theta=float(config["rope_theta"]),
            attn_implementation="eager",
        )  # fmt: skip
        self.model = StableLmModel(text)
        wanted = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "image_size", "patch_size", "projection_dim")  # fmt: skip
        tower = CLIPVisionConfig(**{name: clip[name] for name in wanted})
        self.model.image_tower = FakeTower(tower)
        self.model.mm_projector = FakeProjector(tower.hidden_size, text.hidden_size)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        moe = config["moe"]
        for index, num_experts in zip(moe["moe_layers_idx"], moe["num_experts"], strict=True):
            layer = self.model.layers[index]
            layer.mlp = moe_class(
                text.hidden_size, layer.mlp, num_experts=num_experts, k=moe["top_k_experts"],
                use_residual=moe["use_residual"], **moe_options,
            )  # fmt: skip
        for layer in self.model.layers:
            layer.forward = layer_forward(layer)
        self.model.forward = decoder_forward(self.model)
        self.model.checkpointing, self.model.reentrant = False, True

    def get_model(self):
        return self.model

    def get_image_tower(self):
        return self.model.image_tower

    def prepare_inputs_labels_for_multimodal(
        self, input_ids, position_ids, attention_mask, past_key_values, labels, images
    ):
        if images is None or input_ids.shape[1] == 1:
            if past_key_values is not None and images is not None:
                # the mask of the prompt grows to the cache's length, read off its last entry
                length = past_key_values[-1][-1].shape[-2] + 1
                attention_mask = F.pad(
                    attention_mask, (0, length - attention_mask.shape[1]), value=1
                )
            return input_ids, position_ids, attention_mask, past_key_values, None, labels
        features = self.model.image_tower(torch.stack(list(images)))
        features = list(self.model.mm_projector.image_spatial_proj(features))
        mask_was, labels_were = attention_mask, labels
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if labels is None:
            labels = torch.full_like(input_ids, -100)
        rows, row_labels = [], []
        for ids, mask, label in zip(input_ids, attention_mask.bool(), labels, strict=True):
            parts, label_parts = [], []
            ids, label = ids[mask], label[mask]
            if IMAGE_TOKEN not in ids:
                features.pop(0)  # used up and not shown
            for token, one in zip(ids, label, strict=True):
                if token == IMAGE_TOKEN:
                    image = features.pop(0)
                    parts.append(image)
                    label_parts.append(torch.full((len(image),), -100))
                else:
                    parts.append(self.model.embed_tokens(token[None]))
                    label_parts.append(one[None])
            limit = getattr(self.config, "tokenizer_model_max_length", None)
            rows.append(torch.cat(parts)[:limit])
            row_labels.append(torch.cat(label_parts)[:limit])
        length = max(len(row) for row in rows)
        left = self.config.tokenizer_padding_side == "left"

        def pad(row, value):
            extra = row.new_full((length - len(row), *row.shape[1:]), value)
            return torch.cat([extra, row] if left else [row, extra])

        new_mask = torch.stack([pad(torch.ones(len(row)), 0) for row in rows])
        embeds = torch.stack([pad(row, 0.0) for row in rows])
        new_labels = torch.stack([pad(row, -100) for row in row_labels])
        return (
            None,
            position_ids,
            None if mask_was is None else new_mask.to(mask_was.dtype),
            past_key_values,
            embeds,
            None if labels_were is None else new_labels,
        )

    def forward(
        self, input_ids=None, attention_mask=None, labels=None, images=None,
        past_key_values=None, inputs_embeds=None, use_cache=False,
    ):  # fmt: skip
        if inputs_embeds is None:
            input_ids, _, attention_mask, past_key_values, inputs_embeds, labels = (
                self.prepare_inputs_labels_for_multimodal(
                    input_ids, None, attention_mask, past_key_values, labels, images
                )
            )
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds,
            past_key_values=past_key_values, use_cache=use_cache,
        )  # fmt: skip
        logits = self.lm_head(outputs.last_hidden_state)
        moe_losses = [loss for loss in outputs.moe_losses if loss is not None]
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            loss = loss + self.router_aux_loss_coef * sum(moe_losses)
        return SimpleNamespace(
            logits=logits, loss=loss, moe_losses=moe_losses,
            past_key_values=outputs.past_key_values,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, images, steps, use_cache=True):
        """Greedy. Prompts are padded on the left."""
        ids, mask, past, new = input_ids, attention_mask, None, []
        for _ in range(steps):
            out = self(ids, mask, images=images, past_key_values=past, use_cache=use_cache)
            new.append(out.logits[:, -1:].argmax(-1))
            if use_cache:
                past, ids = out.past_key_values, new[-1]
                # after the prompt, what the splicing made of the mask
                mask = self.mask_of(input_ids, attention_mask, images)
            else:
                ids = torch.cat([ids, new[-1]], 1)
                mask = F.pad(mask, (0, 1), value=1)
        return torch.cat(new, 1)

    @staticmethod
    def reorder(past_key_values, rows):
        """What a beam search does with the cache."""
        return tuple(
            tuple(state.index_select(0, rows) for state in layer) for layer in past_key_values
        )

    def mask_of(self, ids, mask, images):
        splice = type(self).prepare_inputs_labels_for_multimodal
        return splice(self, ids, None, mask, None, None, images)[2]


def golden_host(**moe_options) -> FakeMoELlava:
    """The golden model."""
    model = FakeMoELlava(golden().config, golden().clip, **moe_options)
    model.load_state_dict(golden_state(model))
    return model.eval()


def golden_state(model) -> dict[str, Tensor]:
    """The golden weights; newer transformers keep CLIP's tower one level higher."""
    deeper = any("image_tower.vision_model." in name for name in model.state_dict())
    return {
        name if deeper else name.replace("image_tower.vision_model.", "image_tower."): value
        for name, value in golden().state.items()
    }
