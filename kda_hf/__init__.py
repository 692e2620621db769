"""Kimi Delta Attention for Hugging Face transformers.

`import kda_hf` registers [`KDAConfig`], [`KDAModel`] and [`KDAForCausalLM`] with transformers' Auto classes. Importing
it needs no GPU.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from . import ops
from .cache import KDACache
from .configuration_kda import KDAConfig
from .integrations.native import accelerate
from .modeling_kda import KDAForCausalLM, KDAModel, KDAPreTrainedModel, KimiDeltaAttention
from .swap import swap_attention


__version__ = "0.1.0"

AutoConfig.register(KDAConfig.model_type, KDAConfig, exist_ok=True)
AutoModel.register(KDAConfig, KDAModel, exist_ok=True)
AutoModelForCausalLM.register(KDAConfig, KDAForCausalLM, exist_ok=True)
MODEL_MAPPING_NAMES[KDAConfig.model_type] = KDAModel.__name__
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[KDAConfig.model_type] = KDAForCausalLM.__name__

__all__ = [
    "KDACache",
    "KDAConfig",
    "KDAForCausalLM",
    "KDAModel",
    "KDAPreTrainedModel",
    "KimiDeltaAttention",
    "accelerate",
    "ops",
    "swap_attention",
]
