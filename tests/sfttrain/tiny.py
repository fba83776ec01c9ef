"""Tiny models of many architectures with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128

# Settings under all names that configs use for them; a config takes those that it has.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Further settings of single architectures.
_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 8, "num_hidden_layers": 6, "layer_types": None},
    "gemma2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "gpt_oss": {"sliding_window": 8, "layer_types": None},
    "cohere2": {"sliding_window": 8},
    "deepseek_v3": {
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "head_dim": None,
        "num_key_value_heads": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8, "num_layers": 2},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "phi3": {"sliding_window": 8},
    "rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "mamba": {"state_size": 8, "intermediate_size": 64, "time_step_rank": 4},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "llama4_text": {"attention_chunk_size": 16, "intermediate_size_mlp": 48, "moe_layers": None},
}


def tiny_model(kind: str, **changes: Any) -> Any:
    """Return a causal language model of an architecture, the same at every call.

    It is in float32, in eval mode, and has no dropout.
    """
    config_class = CONFIG_MAPPING[kind]
    known = set(config_class().to_dict()) | set(getattr(config_class, "attribute_map", {}))
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    sizes |= {name: 0.0 for name in known if name.endswith(("dropout", "pdrop"))}
    special = _SPECIAL.get(kind, {})
    settings = {n: v for n, v in {**sizes, **special, **changes}.items() if v is not None}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**settings), dtype=torch.float32)
    # The weights are larger than usual at the start of training, where logits depend on little
    # more than the last token.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.normal_(0.0, 0.15)
    return model.eval()
