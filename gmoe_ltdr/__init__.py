"""Sparse mixture-of-experts vision transformers with the Long-Tailed Distribution-aware Router.

The method of arXiv 2507.01351, GMoE and their relatives as timm models and layers. Importing this
package registers `ltdr_*` and `gmoe_*` models with timm.
"""

import gmoe_ltdr.small_vits  # noqa: F401  registers its models with timm
from gmoe_ltdr.collect import collect_routing, moe_layers
from gmoe_ltdr.engines import use_expert_backend
from gmoe_ltdr.losses import balance_loss
from gmoe_ltdr.models import create_moe_vit, load_model, save_model
from gmoe_ltdr.moe import MoE
from gmoe_ltdr.routers import available_routers
from gmoe_ltdr.routing import Modality, Routing, TokenContext
from gmoe_ltdr.spec import MoESpec, preset
from gmoe_ltdr.tail import TailRule
from gmoe_ltdr.upcycle import upcycle_

__version__ = "0.1.0"

__all__ = [
    "MoE",
    "MoESpec",
    "Modality",
    "Routing",
    "TailRule",
    "TokenContext",
    "available_routers",
    "balance_loss",
    "collect_routing",
    "create_moe_vit",
    "load_model",
    "moe_layers",
    "preset",
    "save_model",
    "upcycle_",
    "use_expert_backend",
]
