"""The mean patch of an image chooses its experts."""

from __future__ import annotations

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import spec_from_hparams


@register_algorithm
class INSTRUCT(SparseViT):
    """One choice of experts per image, by the mean of its patches (after Octavius, LoRA-MoE)."""

    preset_name = "gmoe_dar"

    def create_spec(self):
        return spec_from_hparams(
            self.preset_name,
            self.hparams,
            router="instruct",
            router_options={"cls": self.hparams["instruct_cls"]},
        )
