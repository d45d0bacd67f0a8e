"""The routers of this package in vision-language models.

modality.py      which token is language, vision or padding, and how MoE layers learn it
"""

from gmoe_ltdr.vlm.modality import TokenModality, modality_map, spliced_modality_map

__all__ = ["TokenModality", "modality_map", "spliced_modality_map"]
