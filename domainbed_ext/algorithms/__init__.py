"""The algorithms, behind DomainBed's contract: `update(minibatches)` and `predict(x)`.

    algorithm = LTDR(input_shape, num_classes, num_domains, hparams)
    algorithm.update([(x, y) for each training domain])   # -> {"loss": ..., ...}
    algorithm.predict(x)                                  # -> logits (B, num_classes)

ERM_ViT is the dense twin of GMOE and LTDR: same backbone, same weights, same grid. A new algorithm
is one file here: subclass `Algorithm` (or `SparseViT`), decorate it with `@register_algorithm`, and
give it hyper-parameters in `router_hparams.py` and `hparam_values.py`.
"""

import importlib
import pkgutil

from domainbed_ext.algorithms.base import (
    Algorithm,
    algorithm_names,
    get_algorithm_class,
    register_algorithm,
)
from domainbed_ext.algorithms.erm import ERM
from domainbed_ext.algorithms.sparse import GMOE, GMOE_DAR, GMOE_EEA, LTDR, SparseViT
from domainbed_ext.algorithms.vit import ERM_ViT

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

ALGORITHMS: list[str] = algorithm_names()

__all__ = [
    "ALGORITHMS",
    "ERM",
    "GMOE",
    "GMOE_DAR",
    "GMOE_EEA",
    "LTDR",
    "Algorithm",
    "ERM_ViT",
    "SparseViT",
    "get_algorithm_class",
    "register_algorithm",
]
