"""Hugging Face LLaVA with a mixture of experts in its language model.

    model = LlavaForConditionalGeneration.from_pretrained(folder)
    model = upcycle_llava(model, vlm_preset("ltdr"))
    loss = model(**processor(images=images, text=prompts), labels=labels).loss
    model.save_pretrained(out)           # and AutoModelForImageTextToText.from_pretrained(out)

A subclass with a configuration of its own, and nothing patched: `generate`, `Trainer`, accelerate
and `save_pretrained` know it as any other model. Imported by name only, since it needs
transformers (4.57 or newer), which is not always there.

Shapes: B rows of the batch (sequences), S tokens per row.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr.collect import collect_routing, moe_layers
from gmoe_ltdr.decoding import reuse_decisions, sequence_decisions, sequence_routers
from gmoe_ltdr.losses import balance_loss
from gmoe_ltdr.routing import Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec
from gmoe_ltdr.vlm.cached_decisions import decisions_in, with_decisions
from gmoe_ltdr.vlm.call_arguments import cache_of, cached_length, share_of_targets, token_mask
from gmoe_ltdr.vlm.checkpointing import with_tokens
from gmoe_ltdr.vlm.decoder import make_sparse_
from gmoe_ltdr.vlm.generation import check_generation, info_of_beams, prompt_shape
from gmoe_ltdr.vlm.modality import TokenModality, modality_map

try:
    from transformers import (
        AutoConfig,
        AutoModelForImageTextToText,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )
    from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"gmoe_ltdr.vlm.transformers needs transformers 4.57 or newer ({error}): "
        "pip install 'gmoe-ltdr[vlm]'"
    ) from error


LANGUAGE = Modality.LANGUAGE
_NOT_IN_A_LOSS = (
    "training without labels: the balance loss is in output.aux_loss and in no loss. Pass labels=, "
    "or add it to the loss you make. Trainer takes the labels away with label_smoothing_factor, "
    "which leaves it out (and does not shift the labels of a LLaVA: set it to 0), and with "
    "compute_loss_func, which can add it"
)


class LTDRLlavaConfig(LlavaConfig):
    """LLaVA's configuration and the description of its sparse layers.

    Attributes:
        moe_spec: `MoESpec.to_dict()`. Its `layers` are those of the language model.
    """

    model_type = "ltdr_llava"

    moe_spec: dict[str, Any] | None = None

    @property
    def spec(self) -> MoESpec:
        """The sparse layers.

        Raises:
            ValueError: There is no description, or an impossible one.
        """
        if not self.moe_spec:
            raise ValueError(
                "LTDRLlavaConfig needs moe_spec=, the to_dict() of a MoESpec; to make a dense "
                "LLaVA sparse, use upcycle_llava(model, spec)"
            )
        return MoESpec.from_dict(self.moe_spec)


@dataclass
class LTDRLlavaOutput(LlavaCausalLMOutputWithPast):
    """LLaVA's output.

    Attributes:
        aux_loss: What balancing (and the router's own losses) add to the loss, already weighted.
            With labels it is in the loss; in training without them, whoever makes the loss adds it;
            None in evaluation without labels.
    """

    aux_loss: Tensor | None = None


class LTDRLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA whose language model routes each token to some of several feed-forward networks.

    Attributes:
        token_modality: Tells the MoE layers which tokens are language, vision, padding.
    """

    config_class = LTDRLlavaConfig

    def __init__(self, config: LTDRLlavaConfig):
        spec = config.spec  # what is wrong with it is said before a large model is made
        super().__init__(config)
        self.token_modality = TokenModality()
        self._prompt_length: int | None = None  # while `generate` runs
        make_sparse_(self.decoder, spec, token_modality=self.token_modality)
        # Routing is float32 whatever the rest of the model is, and so are its parameters. Said
        # here, as a class attribute would be checked before there is a router; and name by name,
        # since a module's name would turn its counts and flags into float32, too.
        in_float32 = _floats_of_routers(self)
        self._keep_in_fp32_modules_strict = {
            *(self._keep_in_fp32_modules_strict or ()),
            *in_float32,
        }

    @property
    def _decides_per_sequence(self) -> bool:
        """Whether the prompt chooses the experts of every token, as with INSTRUCT."""
        return bool(sequence_routers(self.decoder))

    @property
    def decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.model.language_model

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        vision_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> LTDRLlavaOutput | tuple:
        """As LLaVA's, plus `vision_mask`: bool (B, S), which tokens are vision.

        It is needed where `inputs_embeds` hide the image tokens, and replaces the search for them
        elsewhere. With labels, the loss contains the balance loss; under gradient accumulation each
        part's balance loss counts by its share of the targets, as its cross-entropy does. In
        training without labels it is in no loss yet, which a warning says.

        Raises:
            ValueError: `inputs_embeds` of several tokens without `vision_mask`.
        """
        tokens = self._tokens(input_ids, pixel_values, attention_mask, vision_mask, kwargs)
        return_dict = kwargs.pop("return_dict", None)
        if return_dict is None:
            return_dict = self.config.return_dict
        call = (input_ids, pixel_values, attention_mask)
        labels, cache = kwargs.get("labels"), cache_of(kwargs)
        context = TokenContext(tokens)
        if labels is not None:
            # what is to be answered chooses, and not the answer
            prompt_BS = (tokens == int(Modality.LANGUAGE)) & (labels == -100)
            context = replace(context, instruction_BL=prompt_BS)
        elif self._prompt_length is not None and tokens.shape[1] > self._prompt_length:
            # generated without a cache: what was generated does not choose either
            prompt_BS = tokens == int(Modality.LANGUAGE)
            prompt_BS[:, self._prompt_length :] = False
            context = replace(context, instruction_BL=prompt_BS)
        depth = len(self.decoder.layers)  # type: ignore[arg-type]
        names = list(sequence_routers(self))
        decided = decisions_in(cache, names, depth=depth) if cached_length(kwargs) else None
        is_prompt = decided is None and bool(names)
        balances = labels is not None or (self.training and torch.is_grad_enabled())
        watches = balances or is_prompt
        routings: dict[str, Routing] = {}
        with self.token_modality.using(context):
            if not watches and not decided:  # the plain way, which torch.compile can follow
                output = super().forward(*call, return_dict=True, **kwargs)
            else:
                watched = collect_routing(self) if watches else nullcontext(routings)
                with reuse_decisions(self, decided or {}), watched as routings:
                    output = super().forward(*call, return_dict=True, **kwargs)
        values = dict(output)
        if is_prompt and cache_of(values) is not None:
            # nothing lives as long as the prompt is known but the cache, so that keeps it
            with_decisions(cache_of(values), sequence_decisions(self, routings), depth=depth)
        if balances:
            spec, device = self.config.spec, values["logits"].device
            # layer by layer, since layers may be on different devices
            per_layer = [balance_loss([routing], spec).to(device) for routing in routings.values()]
            values["aux_loss"] = torch.stack(per_layer).sum()
            if labels is not None:
                values["loss"] = values["loss"] + share_of_targets(kwargs) * values["aux_loss"]
            elif _has_balance_loss(spec, routings):
                warnings.warn(_NOT_IN_A_LOSS, stacklevel=2)
        output = LTDRLlavaOutput(**values)
        return output if return_dict else output.to_tuple()

    def _tokens(
        self,
        input_ids: Tensor | None,
        pixel_values: Tensor | None,
        attention_mask: Any,
        vision_mask: Tensor | None,
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """What the tokens of this forward are, uint8 (B, S)."""
        embeds: Any = kwargs.get("inputs_embeds")
        if input_ids is None:
            if embeds is None:
                raise ValueError("LLaVA needs input_ids or inputs_embeds, and got neither")
            if vision_mask is None and embeds.shape[1] > 1:
                raise ValueError(
                    "inputs_embeds do not show which tokens are images: pass vision_mask, a bool "
                    f"tensor of shape {tuple(embeds.shape[:2])}"
                )
        # the ids' shape is all that counts where a mask says which tokens are vision
        ids_BS = input_ids if input_ids is not None else embeds[:, :, 0]
        if ids_BS.shape[1] == 1:  # decoding; masks may describe the prompt as well
            return torch.full_like(ids_BS, int(LANGUAGE), dtype=torch.uint8)
        if vision_mask is not None and self._prompt_length == vision_mask.shape[1]:
            # generated without a cache: the mask describes the prompt, and what follows is language
            vision_mask = F.pad(vision_mask, (0, ids_BS.shape[1] - vision_mask.shape[1]))
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        return modality_map(
            ids_BS,
            self.config.image_token_id,
            token_mask(attention_mask, ids_BS.shape[1], cached_length(kwargs)),
            has_images=pixel_values is not None or encoded is not None,
            vision_mask=vision_mask,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As any model's; with a router or tail rule that looks at a whole prompt, not in chunks,
        and with one that compares what is generated with what was there, not without a cache.

        Raises:
            ValueError: `prefill_chunk_size` or `use_cache=False` where that would change what the
                model does.
        """
        spec, per_sequence = self.config.spec, self._decides_per_sequence
        check_generation(spec, kwargs, self.generation_config, per_sequence=per_sequence)
        prompt = prompt_shape(args, kwargs)
        before = self._prompt_length, self.token_modality.image_info
        if prompt is not None:
            num_rows, self._prompt_length = prompt
            self.token_modality.image_info = info_of_beams(
                before[1], kwargs, self.generation_config, num_rows=num_rows
            )
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._prompt_length, self.token_modality.image_info = before

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute layers in backward, each with the tokens of its own forward.

        Raises:
            ValueError: `use_reentrant=True`, under which the balance loss would have no gradient.
        """
        given = dict(gradient_checkpointing_kwargs or {})
        if given.setdefault("use_reentrant", False):
            raise ValueError(
                "use_reentrant=True would leave the balance loss without gradient; use "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        given["context_fn"] = with_tokens(self.token_modality, given.get("context_fn"))
        super().gradient_checkpointing_enable(given, **options)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """As any model's, but for what a folder lacks of a sparse layer: nobody would initialise
        that, since transformers asks the text model to, which does not know such layers.

        Raises:
            ValueError: The folder lacks weights or buffers of a sparse layer.
        """
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        prefixes = tuple(f"{name}." for name in moe_layers(model))
        missing = sorted(name for name in info["missing_keys"] if name.startswith(prefixes))
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors of its sparse layers: "
                f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; its moe_spec is "
                "not what it was saved with, or a file is missing"
            )
        return (model, info) if output_loading_info else model


def _with_signature_of_llava(forward: Callable) -> Callable:
    """`generate` and `Trainer` read from the signature what a model can be given, and its names
    differ between versions of transformers."""
    signature = inspect.signature(LlavaForConditionalGeneration.forward)
    parameters = list(signature.parameters.values())
    own = inspect.signature(forward).parameters["vision_mask"]
    parameters.insert(-1, own)  # before **kwargs
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


_with_signature_of_llava(LTDRLlavaForConditionalGeneration.forward)

AutoConfig.register("ltdr_llava", LTDRLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    LTDRLlavaConfig, LTDRLlavaForConditionalGeneration, exist_ok=True
)


def upcycle_llava(
    model: LlavaForConditionalGeneration, spec: MoESpec
) -> LTDRLlavaForConditionalGeneration:
    """A sparse LLaVA whose experts are copies of the dense one's feed-forward networks.

    With weights that sum to 1 (`renormalize`, two experts or more) it computes what the dense model
    computes.

    Args:
        model: The dense model. Its modules go over into the sparse one, so it is used up.
        spec: The sparse model, of `vlm_preset` for instance.

    Raises:
        TypeError: Not a LLaVA, or feed-forward networks of an unknown shape.
        ValueError: It is sparse already, or a layer does not exist.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(
            f"upcycle_llava takes a LlavaForConditionalGeneration, not a {type(model).__name__}"
        )
    if moe_layers(model):
        raise ValueError(f"the model is sparse already: {', '.join(moe_layers(model))}")
    if getattr(model.config, "moe_spec", None) is not None:
        raise ValueError(
            "the model was loaded from a sparse LLaVA's folder, whose experts its class leaves "
            "out; load that with LTDRLlavaForConditionalGeneration, or upcycle the dense LLaVA"
        )
    values = model.config.to_dict()
    for name in ("model_type", "text_config", "vision_config", "architectures"):
        values.pop(name, None)
    config = LTDRLlavaConfig(
        **values,
        # the very objects, which hold what no dictionary does (the choice of attention)
        text_config=model.config.text_config,
        vision_config=model.config.vision_config,
        moe_spec=spec.to_dict(),
    )
    config._attn_implementation = model.config._attn_implementation
    token_modality = TokenModality()
    with torch.device("meta"):  # a hull, whose parts are replaced
        sparse = LTDRLlavaForConditionalGeneration(config)
    make_sparse_(model.model.language_model, spec, token_modality=token_modality, copy=True)
    model.model.config = config
    sparse.model, sparse.lm_head = model.model, model.lm_head
    sparse.token_modality = token_modality
    sparse.generation_config = model.generation_config
    return sparse.train(model.training)


def _floats_of_routers(model: nn.Module) -> set[str]:
    """Names of the routers' parameters and buffers of the model's own type: what a checkpoint of
    another type is cast to, which float64, integers and flags are not."""
    return {
        f"{layer}.router.{name}"
        for layer, module in moe_layers(model).items()
        for name, value in module.router.state_dict().items()
        if value.is_floating_point() and value.dtype != torch.float64
    }


def _has_balance_loss(spec: MoESpec, routings: Mapping[str, Routing]) -> bool:
    """Whether training adds anything to the loss; if not, `balance_loss` is a zero."""
    weights = spec.router_options.get("balance_weights") or {"all": spec.balance_weight}
    balances = spec.balance != "none" and any(weights.values())
    return balances or any(plan.router_losses for plan in routings.values())
