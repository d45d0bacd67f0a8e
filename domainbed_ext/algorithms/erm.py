"""DomainBed's baseline: one network, the mean loss over all training domains."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from domainbed_ext.algorithms.base import Algorithm, join, register_algorithm
from domainbed_ext.networks import create_classifier, create_featurizer
from domainbed_ext.optimization import as_input, autocast, use_fused_kernels_
from domainbed_ext.weight_averaging import create_average


@register_algorithm
class ERM(Algorithm):
    """Empirical risk minimisation, with DomainBed's networks and hyper-parameters (ResNet-50)."""

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.featurizer = create_featurizer(input_shape, hparams)
        self.classifier = create_classifier(
            self.featurizer.n_outputs, num_classes, nonlinear=hparams["nonlinear_classifier"]
        )
        self.weights_tag = self.featurizer.weights_tag
        self.optimizer = torch.optim.Adam(
            self.parameters(), lr=hparams["lr"], weight_decay=hparams["weight_decay"]
        )
        predicting = {"featurizer": self.featurizer, "classifier": self.classifier}
        self.average = create_average(predicting, hparams)

    def update(self, minibatches, unlabeled=None):
        x, y = join(minibatches)
        loss = F.cross_entropy(self.predict(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        use_fused_kernels_(self.optimizer, self.hparams)
        self.optimizer.step()
        if self.average is not None:
            self.average.update()
        return {"loss": loss.item()}

    def predict(self, x):
        x = as_input(x, self.hparams)
        with autocast(x.device, self.hparams.get("precision", "fp32")):
            return self.classifier(self.featurizer(x)).float()
