"""Experts of their own for the class token and for patches."""

from __future__ import annotations

from domainbed_ext.algorithms.base import register_algorithm
from domainbed_ext.algorithms.sparse import SparseViT
from domainbed_ext.backbones import check_class_token, spec_from_hparams


@register_algorithm
class GROUPS(SparseViT):
    """Groups of experts, in the settings of LTDR's table 11, where they belong to modalities."""

    def create_spec(self):
        return spec_from_hparams(
            f"groups_{self.hparams['groups_setting']}",
            self.hparams,
            router_options={"group_by": self.hparams["groups_by"]},
        )

    def create_network(self, input_shape, num_classes):
        network = super().create_network(input_shape, num_classes)
        if self.hparams["groups_by"] == "cls":
            check_class_token(network, self.hparams, "hparam groups_by='cls' keeps experts")
        return network
