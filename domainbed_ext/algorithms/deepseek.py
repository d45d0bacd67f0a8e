"""A shared expert for every token, and many narrow routed ones."""

from __future__ import annotations

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import spec_from_hparams


@register_algorithm
class DEEPSEEK(SparseViT):
    """Shared and fine-grained experts (after DeepSeekMoE), in the settings of LTDR's table 6."""

    def create_spec(self):
        top_k = self.hparams["deepseek_top_k"]
        return spec_from_hparams(
            f"deepseek_{self.hparams['deepseek_setting']}",
            self.hparams,
            init_scale_shared=self.hparams["deepseek_init_scale_shared"],
            **({"top_k": top_k} if top_k else {}),
        )
