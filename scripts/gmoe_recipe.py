"""GMoE's own training step, for `bench_train.py`: with nothing of this project in it.

Tutel's MoE layer as GMoE was released with it: cosine gate in float32 with noise, a capacity that
goes to the surest tokens first, importance and load losses; and attention that is written out.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gmoe_ltdr import MoESpec

RECIPE = "gmoe-recipe"


class TutelMlp(nn.Module):
    """Tutel's layer in the place of a block's feed-forward network."""

    def __init__(self, mlp: nn.Module, spec: MoESpec):
        super().__init__()
        from tutel import moe

        hidden_dim, dim = mlp.fc1.weight.shape
        self.layer = moe.moe_layer(
            gate_type={
                "type": "cosine_top",
                "k": spec.top_k,
                "fp32_gate": True,
                "gate_noise": spec.noise_std,
                "capacity_factor": spec.capacity_factor,
            },
            model_dim=dim,
            experts={
                "type": "ffn",
                "num_experts_per_device": spec.num_experts,
                "hidden_size_per_expert": hidden_dim,
                "activation_fn": lambda x: F.dropout(F.gelu(x), spec.expert_dropout),
            },
            batch_prioritized_routing=True,
            is_gshard_loss=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def create_recipe(backbone: str, spec: MoESpec) -> nn.Module:
    """A timm ViT with Tutel's layers where GMoE has them.

    Raises:
        ImportError: Tutel is not installed.
    """
    model = timm.create_model(backbone, pretrained=False, num_classes=7)
    for block in model.blocks:
        block.attn.fused_attn = False
    for index in spec.block_indices(len(model.blocks)):
        model.blocks[index].mlp = TutelMlp(model.blocks[index].mlp, spec)
    return model


def recipe_loss(model: nn.Module) -> Tensor | float:
    """Tutel's balance losses of the last forward, weighted as GMoE weights them; 0 without any."""
    losses = [m.layer.l_aux for m in model.modules() if isinstance(m, TutelMlp)]
    return 0.01 * torch.stack(losses).sum() if losses else 0.0
