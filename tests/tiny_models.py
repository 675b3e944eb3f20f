"""Tiny random models, at least one for almost every architecture in mlx-lm.

Nothing is downloaded. Each entry of `TINY_CONFIGS` is a configuration in the form mlx-lm reads from
a checkpoint's ``config.json``, small enough that a forward pass on a CPU takes milliseconds. An
entry spells out what sets its architecture apart; all other fields come from one shared table.

The values are chosen so that mistakes show:

* windows, chunks and top-k key budgets are smaller than a 20-token prompt, so that they cut;
* there are fewer key-value heads than query heads wherever an architecture allows it;
* the head is untied wherever there is a choice, so that taking the wrong matrix for the head shows
  in the logits, except in the entries whose name ends in "-tied" and in gemma4;
* every kind of layer an architecture mixes (sliding and full, dense and sparse, recurrent and
  attention, with and without rotary positions, with borrowed keys) occurs at least once.

With its own cache every entry agrees with itself: the logits after one forward pass over a prompt
equal those after feeding the same prompt piece by piece. Where an architecture breaks that by
itself, a comment beside the entry says how the values avoid it.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import base

from mlx_distill.compat import model_classes

# mlx-lm looks a configuration's class over for each of its fields, which takes longer than to build
# a tiny model: every class is looked over once.
base.inspect = SimpleNamespace(signature=functools.cache(inspect.signature))  # pyright: ignore

# Values by field name, for every configuration class that has a field of that name. Architectures
# call the same quantity by different names, hence the groups.
_SHARED_GROUPS: list[tuple[Any, str]] = [
    # Sizes.
    (64, "hidden_size n_embd d_model model_dim hidden_dim"),
    (3, "num_hidden_layers num_layers n_layers n_layer num_transformer_layers"),
    (4, "num_attention_heads num_heads n_heads n_head"),
    (2, "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups"),
    (16, "head_dim v_head_dim qk_nope_head_dim hidden_size_per_head kv_channels"),
    (8, "qk_rope_head_dim rotary_dim"),
    (32, "q_lora_rank kv_lora_rank"),
    (96, "intermediate_size intermediate_size_mlp dense_intermediate_size ffn_hidden_size"),
    (96, "n_inner ff_intermediate_size"),
    (97, "vocab_size num_vocab"),
    # Positions.
    (256, "max_position_embeddings n_positions n_ctx block_size model_max_length"),
    (10000.0, "rope_theta swa_rope_theta rotary_emb_base rope_embedding_base"),
    (None, "rope_scaling"),
    (1000.0, "rope_local_base_freq rope_local_theta"),
    (0.5, "partial_rotary_factor rotary_pct"),
    (8, "sliding_window sliding_window_size attention_window_size loop_window_size"),
    (3, "sliding_window_pattern"),
    # Experts: two out of four, after one dense layer where there is a choice.
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    (1, "n_shared_experts num_shared_experts num_shared_expert moe_num_shared_experts"),
    (32, "moe_intermediate_size moe_shared_expert_intermediate_size expert_ffn_hidden_size"),
    (32, "shared_expert_intermediate_size shared_intermediate_size share_expert_dim"),
    (1, "first_k_dense_replace num_dense_layers moe_layer_start_index"),
    (1, "n_group topk_group decoder_sparse_step moe_layer_freq"),
    ([], "mlp_only_layers"),
    (True, "norm_topk_prob"),
    (1.5, "routed_scaling_factor moe_routed_scaling_factor"),
    ("sigmoid", "scoring_func"),
    ("noaux_tc", "topk_method"),
    # Sparse attention: a few keys out of the prompt.
    (8, "index_topk index_head_dim"),
    (4, "index_n_heads"),
    # Norms, biases, scales, and the choice to tie the head.
    (1e-5, "rms_norm_eps layer_norm_eps norm_eps norm_epsilon layer_norm_epsilon"),
    (1e-5, "layernorm_epsilon post_norm_eps"),
    (False, "attention_bias mlp_bias use_bias use_qkv_bias tie_word_embeddings"),
    (True, "use_qk_norm"),
    (16, "query_pre_attn_scalar"),
    (3.0, "embedding_multiplier"),
    (0.3, "attention_multiplier"),
    (0.8, "residual_multiplier"),
    (2.0, "logits_scaling"),
    (0.5, "logit_scale"),
    # Recurrent layers.
    (4, "conv_kernel conv_L_cache conv1d_width mamba_d_conv linear_conv_kernel_dim"),
    (8, "state_size ssm_state_size mamba_d_state"),
    (True, "use_conv_bias mamba_conv_bias conv_bias"),
    (False, "mamba_proj_bias"),
    (4, "time_step_rank mamba_n_heads mamba_num_heads linear_num_value_heads"),
    (16, "mamba_d_head mamba_head_dim linear_key_head_dim linear_value_head_dim"),
    (2, "mamba_expand n_groups mamba_n_groups linear_num_key_heads group_norm_size"),
    (64, "mamba_d_ssm"),
]
_SHARED: dict[str, Any] = {
    field: value for value, fields in _SHARED_GROUPS for field in fields.split()
}

# One full-attention layer between two windows.
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]

_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_ROPE_BY_KIND = {
    "full_attention": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
    "sliding_attention": {**_DEFAULT_ROPE, "rope_theta": 1000.0},
}
# An original context of 64 puts some frequencies on either side of the scaling's threshold.
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Queries are scaled by their position, in steps of the "original" length.
_LLAMA4_SCALE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "llama_4_scaling_beta": 0.5,
}


def _longrope(kind: str, dims: int) -> dict[str, Any]:
    """Return a "longrope" scaling for a rotary size of `dims`."""
    steps = range(dims // 2)
    return {
        "type": kind,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0 + 0.05 * i for i in steps],
        "long_factor": [1.0 + 0.25 * i for i in steps],
        "short_mscale": 1.1,
        "long_mscale": 1.2,
    }


def _of(model_type: str, **overrides: Any) -> dict[str, Any]:
    return {"model_type": model_type, **overrides}


def _text_of(model_type: str, text_type: str, **overrides: Any) -> dict[str, Any]:
    """Return an entry for a multimodal wrapper, whose text model is configured in a sub-table."""
    return {"model_type": model_type, "text_config": {"model_type": text_type, **overrides}}


_GEMMA3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
    "final_logit_softcapping": 30.0,
    "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    "altup_num_inputs": 2,
    "altup_coef_clip": 100.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 8,
}
_GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window_pattern": 2,
    "global_head_dim": 32,
    "tie_word_embeddings": True,
    "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8,
}
_QWEN3_5 = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "rope_parameters": {**_DEFAULT_ROPE, "partial_rotary_factor": 0.5},
}
_LFM2 = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_dim": 64,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
}
_KIMI_LINEAR = {
    "linear_attn_config": {
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
        # Counted from one.
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
    },
}
_MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 4.0}
_LONGCAT = {"zero_expert_num": 2, "mla_scale_q_lora": True, "mla_scale_kv_lora": True}

# Architectures that need nothing beyond the shared values.
_PLAIN = """
    Klear bailing_moe cohere2 deepseek deepseek_v3 deepseek_v32 dots1 ernie4_5 ernie4_5_moe exaone
    gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neox gptj granite
    granitemoe helium internlm2 internlm3 iquestloopcoder lille-130m llama mamba mimo minimax
    mixtral nanochat olmo2 olmoe phi phi3 phimoe phixtral qwen qwen2 qwen2_moe qwen3 qwen3_moe
    seed_oss solar_open starcoder2 talkie telechat3 youtu_llm
"""
# Tied heads, with the embedding in its usual and in unusual places.
_TIED = "bailing_moe exaone gpt_bigcode internlm2 llama qwen2 seed_oss starcoder2"

TINY_CONFIGS: dict[str, dict[str, Any]] = {
    **{name: _of(name) for name in _PLAIN.split()},
    **{f"{name}-tied": _of(name, tie_word_embeddings=True) for name in _TIED.split()},
    # The kinds of rotary scaling, on the plainest architecture.
    "llama-traditional": _of("llama", rope_traditional=True),
    "llama-linear": _of("llama", rope_scaling={"type": "linear", "factor": 2.0}),
    # Past the maximum position the rotary base depends on the length, and cached keys no longer
    # fit the queries: 256 stays above any prompt here.
    "llama-dynamic": _of("llama", rope_scaling={"type": "dynamic", "factor": 2.0}),
    "llama-llama3": _of("llama", rope_scaling=_LLAMA3),
    "llama-yarn": _of("llama", rope_scaling=_YARN),
    "llama-longrope": _of("llama", rope_scaling=_longrope("longrope", 16)),
    "llama-sliding": _of("llama", layer_types=_SLIDING),
    "mistral": _of("mistral"),
    # Attention throughout.
    "afm7": _of("afm7", num_kv_reuse_layers=1),
    "afmoe": _of("afmoe", layer_types=_SLIDING),
    "apertus": _of("apertus", post_norm=True, qk_norm=True),
    "cohere": _of("cohere", use_qk_norm=False),
    "dbrx": _of(
        "dbrx",
        ffn_config={"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    ),
    "deepseek_v2": _of("deepseek_v2", rope_scaling=_YARN, topk_method="greedy"),
    "deepseek_v3-yarn": _of("deepseek_v3", rope_scaling={**_YARN, "mscale_all_dim": 1.0}),
    # A head size that its simulated quantization skips, since rounding can amplify float noise.
    "deepseek_v41": _of(
        "deepseek_v41",
        num_hidden_layers=4,
        head_dim=24,
        o_groups=2,
        o_lora_rank=16,
        compress_ratios=[0, 2, 2, 0],
        kv_source_layer_ids=[1],
        index_source_layer_ids=[1],
        index_topk=4,
        hc_mult=2,
    ),
    "exaone4": _of("exaone4", sliding_window_pattern="LLG"),
    "exaone_moe": _of("exaone_moe", layer_types=_SLIDING, is_moe_layer=[False, True, True]),
    "gemma3": _text_of("gemma3", "gemma3_text"),
    "gemma3n": _text_of("gemma3n", "gemma3n_text", **_GEMMA3N),
    "gemma4": _text_of("gemma4", "gemma4_text", **_GEMMA4),
    "gemma4_text": _of("gemma4_text", **_GEMMA4),
    "gemma4_text-moe": _of(
        "gemma4_text",
        sliding_window_pattern=2,
        global_head_dim=32,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        enable_moe_block=True,
        tie_word_embeddings=True,
    ),
    "glm_moe_dsa": _of("glm_moe_dsa", rope_parameters=_DEFAULT_ROPE),
    "gpt_oss": _of("gpt_oss", layer_types=_SLIDING, rope_scaling=_YARN),
    "hunyuan": _of(
        "hunyuan",
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 8.0},
        use_mixed_mlp_moe=True,
        use_cla=True,
        cla_share_factor=2,
    ),
    "hunyuan_v1_dense": _of(
        "hunyuan_v1_dense", rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 8.0}
    ),
    "internlm3-dynamic": _of("internlm3", rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "kimi_k25": _text_of("kimi_k25", "kimi_k2"),
    "kimi_vl": _text_of("kimi_vl", "deepseek_v3"),
    "laguna": _of("laguna", layer_types=_SLIDING, rope_parameters=_ROPE_BY_KIND),
    "llama4": _text_of(
        "llama4",
        "llama4_text",
        num_hidden_layers=4,
        attention_chunk_size=8,
        interleave_moe_layer_step=2,
        num_experts_per_tok=1,
        floor_scale=6,
    ),
    "llama4_text": _of("llama4_text", no_rope_layers=[1, 0, 1]),
    "llama4_text-tied": _of("llama4_text", no_rope_layers=[1, 0, 1], tie_word_embeddings=True),
    "longcat_flash": _of(
        "longcat_flash", attention_method="MLA", zero_expert_type="identity", **_LONGCAT
    ),
    "mellum": _of("mellum", layer_types=_SLIDING, rope_parameters=_ROPE_BY_KIND),
    "mimo_v2_flash": _of(
        "mimo_v2_flash",
        hybrid_layer_pattern=[1, 0, 1],
        moe_layer_freq=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        swa_num_attention_heads=4,
        swa_num_key_value_heads=1,
        swa_head_dim=16,
        swa_v_head_dim=8,
    ),
    "minicpm": _of("minicpm", **_MINICPM),
    "minicpm3": _of("minicpm3", rope_scaling=_longrope("longrope", 8), **_MINICPM),
    "minimax_m3_vl": _text_of(
        "minimax_m3_vl",
        "minimax_m3",
        mlp_layer_types=["dense", "sparse", "sparse"],
        sparse_attention_freq=[0, 1, 1],
        moe_layer_freq=None,
        index_n_heads=2,
        index_block_size=4,
        index_topk_blocks=2,
    ),
    "ministral3": _of("ministral3", layer_types=_SLIDING, rope_parameters=_LLAMA4_SCALE),
    "mistral3": _text_of("mistral3", "ministral3", rope_parameters=_LLAMA4_SCALE),
    "mistral4": _of("mistral4", rope_parameters=_LLAMA4_SCALE),
    "muse_glimmer": _of("muse_glimmer", layer_types=_SLIDING),
    "nanbeige": _of("nanbeige", num_loops=2),
    "nemotron": _of("nemotron", hidden_act="relu2"),
    "nemotron-nas": _of(
        "nemotron-nas",
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    ),
    "olmo3": _of("olmo3", layer_types=_SLIDING),
    "openelm": _of(
        "openelm",
        num_query_heads=[4, 4, 8],
        num_kv_heads=[1, 2, 2],
        ffn_multipliers=[1.0, 1.5, 2.0],
        ffn_dim_divisor=8,
    ),
    "phi3-longrope": _of(
        "phi3", rope_scaling=_longrope("longrope", 8), original_max_position_embeddings=64
    ),
    "phi3-su": _of("phi3", rope_scaling=_longrope("su", 8), original_max_position_embeddings=64),
    "phimoe-longrope": _of(
        "phimoe", rope_scaling=_longrope("longrope", 16), original_max_position_embeddings=64
    ),
    # Its head bars token ids above 100,000 by number, so the vocabulary has to reach that far.
    "phi3small": _of(
        "phi3small", vocab_size=100_352, dense_attention_every_n_layers=2, gegelu_limit=20.0
    ),
    "pixtral": _text_of("pixtral", "mistral"),
    "plamo": _of("plamo", n_shared_head=2),
    # A forward pass sees one key more than its window, and the cache drops that key: one pass and
    # single steps disagree past the window, so this one is wider than a prompt.
    "plamo3": _of("plamo3", sliding_window=128),
    "qwen2_vl": _text_of("qwen2_vl", "qwen2"),
    "qwen3_vl": _text_of("qwen3_vl", "qwen3"),
    "qwen3_vl_moe": _text_of("qwen3_vl_moe", "qwen3_moe"),
    "smollm3": _of("smollm3", no_rope_layer_interval=2),
    "spark2_5": _of("spark2_5", layer_types=_SLIDING, rope_parameters=_ROPE_BY_KIND),
    "stablelm": _of("stablelm", use_qkv_bias=True),
    "stablelm-parallel": _of("stablelm", use_parallel_residual=True, qk_layernorm=True),
    "step3p5": _of(
        "step3p5",
        layer_types=_SLIDING,
        moe_layers_enum="1,2",
        partial_rotary_factors=[1.0, 0.5, 1.0],
        attention_other_setting={"num_attention_heads": 8, "num_attention_groups": 2},
    ),
    # Recurrent layers, alone or beside attention.
    "baichuan_m1": _of("baichuan_m1", conv_window=2, sliding_window_layers=[0, 2]),
    "bailing_hybrid": _of("bailing_hybrid", num_hidden_layers=4, layer_group_size=2),
    "bailing_moe_linear": _of("bailing_moe_linear", num_hidden_layers=4, layer_group_size=2),
    "bailing_moe_v3": _of(
        "bailing_hybrid",
        # Tells it from the other architecture of that model type.
        architectures=["BailingMoeV3ForCausalLM"],
        num_hidden_layers=4,
        layer_group_size=2,
    ),
    "falcon_h1": _of("falcon_h1", lm_head_multiplier=0.5),
    "gear": _of("gear", layer_types=["sliding_attention", "conv_mixer", "full_attention"]),
    "granitemoehybrid": _of("granitemoehybrid", layer_types=["mamba", "attention", "mamba"]),
    "jamba": _of(
        "jamba",
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=1,
        expert_layer_period=2,
    ),
    "kimi_k3": _text_of(
        "kimi_k3", "kimi_linear", attn_res_block_size=2, mla_use_output_gate=True, **_KIMI_LINEAR
    ),
    "kimi_linear": _of("kimi_linear", **_KIMI_LINEAR),
    "lfm2": _of("lfm2", **_LFM2),
    "lfm2-vl": _text_of("lfm2-vl", "lfm2", **_LFM2),
    "lfm2_moe": _of("lfm2_moe", use_expert_bias=True, layer_types=_LFM2["layer_types"]),
    # Attention throughout, but the embedding of a token also reads the two tokens before.
    "longcat_flash_ngram": _of(
        "longcat_flash_ngram",
        ngram_vocab_size_ratio=2,
        emb_neighbor_num=3,
        emb_split_num=2,
        **_LONGCAT,
    ),
    "mamba2": _of("mamba2", intermediate_size=64, time_step_limit=[0.0, 100.0]),
    "nemotron_h": _of(
        "nemotron_h", layers_block_type=["mamba", "moe", "attention", "mlp"], num_hidden_layers=4
    ),
    "olmo_hybrid": _of(
        "olmo_hybrid",
        linear_allow_neg_eigval=True,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
    ),
    "plamo2": _of("plamo2", mamba_step=2),
    "qwen3_5": _text_of("qwen3_5", "qwen3_5_text", **_QWEN3_5, num_experts=0),
    "qwen3_5_moe": _text_of("qwen3_5_moe", "qwen3_5_moe_text", **_QWEN3_5),
    "qwen3_next": _of("qwen3_next", num_hidden_layers=4, full_attention_interval=2),
    "recurrent_gemma": _of(
        "recurrent_gemma",
        block_types=["recurrent", "attention", "recurrent"],
        num_key_value_heads=1,
        logits_soft_cap=30.0,
    ),
    "rwkv7": _of(
        "rwkv7",
        a_low_rank_dim=8,
        v_low_rank_dim=8,
        gate_low_rank_dim=8,
        decay_low_rank_dim=8,
    ),
}

# Architectures of mlx-lm without an entry, and why.
NOT_BUILT: dict[str, str] = {
    "bitnet": "Its ternary linear layers exist as a Metal kernel only.",
    "muse_spark": "Its query and key norms exist as Metal kernels only.",
    "olmo": (
        "Importing it ends the process where the package ai2-olmo is missing, and its attention "
        "adds the string that stands for a causal mask to the scores, which fails for a prompt."
    ),
    "prism_hadamard_qwen35": "It takes packed 2-bit weights only, so nothing of it is float32.",
}

# Modules beside the architectures that are no architecture themselves.
HELPER_MODULES: frozenset[str] = frozenset(
    {
        "activations",
        "base",
        "bitlinear_layers",
        "cache",
        "gated_delta",
        "mla",
        "pipeline",
        "rope_utils",
        "ssm",
        "switch_layers",
    }
)


# What sets in at some length of the text, by field name: windows, chunks, budgets, scales.
_THRESHOLDS = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "loop_window_size"),
    *("attention_chunk_size", "index_topk", "floor_scale"),
)


def at_threshold(config: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a configuration in which everything that sets in early sets in at one length.

    Args:
        config: From `tiny_config`.
        length: In tokens; a multiple of the four tokens of a block.
    """

    def moved(field: str, value: Any, table: dict[str, Any]) -> Any:
        if isinstance(value, dict):
            return {key: moved(key, one, value) for key, one in value.items()}
        if field in _THRESHOLDS and isinstance(value, int) and 0 < value <= 16:
            return length
        if field == "index_topk_blocks":
            return length // table["index_block_size"]
        if field == "original_max_position_embeddings" and "llama_4_scaling_beta" in table:
            return length
        return value

    return moved("", config, {})


def tiny_config(name: str) -> dict[str, Any]:
    """Return the complete configuration of an entry, as ``config.json`` would hold it.

    Args:
        name: A key of `TINY_CONFIGS`.

    Returns:
        A new dictionary that can be changed freely and written as JSON.
    """
    entry = TINY_CONFIGS[name]
    _, args_class = model_classes(entry)
    fields = {field.name for field in dataclasses.fields(args_class)}
    config = {key: value for key, value in _SHARED.items() if key in fields} | entry
    if "text_config" in config:
        # The class behind a sub-table has no common name. It ignores what it does not know.
        config["text_config"] = _SHARED | config["text_config"]
    return copy.deepcopy(config)


def tiny_model(
    name: str, seed: int = 0, threshold: int | None = None, **overrides: Any
) -> nn.Module:
    """Build an entry in float32, with random weights that make context and position matter.

    The initial values of mlx-lm would not do: they leave attention almost uniform, and some
    routers, heads and convolutions zero. Matrices are drawn anew, wide enough for peaked attention
    and clearly different logits. Vectors, and gains of any shape, stay near their initial values,
    which are meaningful in each architecture (one or zero for a norm, a decay rate for a recurrent
    layer). Scalars are kept.

    Args:
        name: A key of `TINY_CONFIGS`.
        seed: Seed of the weights. The same seed gives the same weights.
        threshold: Where windows, chunks, budgets and scales set in, in tokens.
        overrides: Values for fields of the configuration.

    Returns:
        The model, in evaluation mode and evaluated.
    """
    config = tiny_config(name) | overrides
    if threshold is not None:
        config = at_threshold(config, threshold)
    model_class, args_class = model_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    weights = []
    for path, value in tree_flatten(model.parameters()):
        noise = mx.random.normal(value.shape)
        if value.ndim > 1 and not mx.all(value == 1).item():
            value = 0.2 * noise
        elif value.ndim > 0:
            value = value + 0.1 * noise
        weights.append((path, value))
    model.update(tree_unflatten(weights))
    model.set_dtype(mx.float32)
    model.eval()
    mx.eval(model.parameters())
    return model
