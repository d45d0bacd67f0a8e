"""The routers of this package in vision-language models.

modality.py      which token is language, vision or padding, and how MoE layers learn it
decoder.py       the feed-forward networks of a language model, made sparse
transformers.py  Hugging Face's LLaVA; needs transformers, so import it by name
"""

from gmoe_ltdr.vlm.decoder import vlm_preset
from gmoe_ltdr.vlm.modality import TokenModality, modality_map, spliced_modality_map

__all__ = ["TokenModality", "modality_map", "spliced_modality_map", "vlm_preset"]
