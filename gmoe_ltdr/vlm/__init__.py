"""The routers of this package in vision-language models.

modality.py              which token is language, vision or padding, and how MoE layers learn it
decoder.py               the feed-forward networks of a language model, made sparse
transformers.py          Hugging Face's LLaVA; needs transformers, so import it by name
moe_llava_checkpoint.py  from_moe_llava: a MoE-LLaVA checkpoint for Hugging Face's LLaVA
moe_llava.py             convert_moe_llava: MoE-LLaVA's own classes, in place
"""

from gmoe_ltdr.vlm.decoder import vlm_preset
from gmoe_ltdr.vlm.modality import TokenModality, modality_map, spliced_modality_map
from gmoe_ltdr.vlm.moe_llava import convert_moe_llava, load_moe_llava
from gmoe_ltdr.vlm.moe_llava_checkpoint import from_moe_llava

__all__ = [
    "TokenModality",
    "convert_moe_llava",
    "from_moe_llava",
    "load_moe_llava",
    "modality_map",
    "spliced_modality_map",
    "vlm_preset",
]
