"""Signatures of the functions that we call in packages which cannot be installed here, copied from published sources.

`test_published_sources.py` downloads the sources that PyPI has and compares. The others were read at the commit given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Published:
    """A function or method of a release."""

    package: str
    version: str
    path: str
    """Of the file inside the wheel or the source archive."""
    name: str
    signature: str
    """Without types."""

    @property
    def id(self) -> str:
        return f"{self.package}-{self.version}:{self.name}"


_FLASH = "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_TE_INIT = (
    "self, num_attention_heads, kv_channels, num_gqa_groups=None, attention_dropout=0.0, qkv_format='sbhd', "
    "attn_mask_type='causal', window_size=None, {new}sequence_parallel=False, tp_size=1, get_rng_state_tracker=None, "
    "tp_group=None, layer_number=None, attention_type='self', cp_group=None, cp_global_ranks=None, cp_stream=None, "
    "cp_comm_type='p2p', softmax_scale=None, softmax_type='vanilla', return_max_logit=False"
)
_TE_FORWARD = (
    "attention_mask=None, qkv_format=None, cu_seqlens_q=None, cu_seqlens_kv=None, cu_seqlens_q_padded=None, "
    "cu_seqlens_kv_padded=None, max_seqlen_q=None, max_seqlen_kv=None, attn_mask_type=None, window_size=None, "
    "{new}checkpoint_core_attention=False, core_attention_bias_type='no_bias', core_attention_bias=None, "
    "alibi_slopes=None, fast_zero_fill=True, inference_params=None, pad_between_seqs=None, fp8_output=False, "
)
_TE_FILE = "transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py"

FLASH_ATTN_2 = (
    Published(
        "flash-attn", "2.8.3", "flash_attn/flash_attn_interface.py", "flash_attn_varlen_func",
        f"{_FLASH}, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
    ),
)  # fmt: skip
FLASH_ATTN_3 = (
    Published(
        "flash-attn", "2.8.3", "hopper/flash_attn_interface.py", "flash_attn_varlen_func",
        f"{_FLASH}, seqused_q=None, seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None, "
        "k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, "
        "pack_gqa=None, deterministic=False, sm_margin=0",
    ),
)  # fmt: skip
FLASH_ATTN_3_CACHE = (
    Published(
        "flash-attn", "2.8.3", "hopper/flash_attn_interface.py", "flash_attn_with_kvcache",
        "q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, "
        "cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None, "
        "max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False",
    ),
)  # fmt: skip
_AITER = (
    f"{_FLASH}, min_seqlen_q=0, dropout_p=0.0, softmax_scale=None, logits_soft_cap=0.0, causal=False, "
    "window_size={window}, bias=None, alibi_slopes=None, deterministic=False, return_lse=False, "
    "return_attn_probs=False, how_v3_bf16_cvt=1, block_table=None, out=None, cu_seqlens_q_padded=None, "
    "cu_seqlens_k_padded=None"
)
AITER_COMMIT = "ROCm/aiter@e4048607a535ace3a2b51ded31b1c8c2d45c0879"
AITER = (
    Published("amd-aiter", "0.1.7.post2.dev18", "aiter/ops/mha.py", "flash_attn_varlen_func",
              _AITER.format(window="(-1, -1)")),
    Published(AITER_COMMIT, "2026-08-22", "aiter/ops/mha.py", "flash_attn_varlen_func",
              _AITER.format(window="(-1, -1, 0)") + ", sink_ptr=None"),
)  # fmt: skip
TE_INIT = (
    Published("transformer-engine", "2.11.0", _TE_FILE, "DotProductAttention.__init__", _TE_INIT.format(new="")),
    Published("transformer-engine", "2.20.2", _TE_FILE, "DotProductAttention.__init__",
              _TE_INIT.format(new="bottom_right_diagonal=None, softcap=0.0, ") + ", name=None"),
)  # fmt: skip
TE_FORWARD = (
    Published("transformer-engine", "2.11.0", _TE_FILE, "DotProductAttention.forward",
              "self, query_layer, key_layer, value_layer, " + _TE_FORWARD.format(new="") + "num_splits=1"),
    Published("transformer-engine", "2.20.2", _TE_FILE, "DotProductAttention.forward",
              "self, query_layer=None, key_layer=None, value_layer=None, "
              + _TE_FORWARD.format(new="bottom_right_diagonal=None, softcap=None, ")
              + "bf16_backward=False, num_splits=1, score_mod=None, score_mod_bprop=None, score_mod_tensors=None, "
              "score_mod_bprop_tensors=None, qkv_layer=None, kv_layer=None, qkv_interleave_dim=-3, "
              "thd_attention_policies=None, thd_attention_policy_dispatch='auto'"),
)  # fmt: skip
_TE_LINEAR = (
    "self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None, "
    "tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False, "
    "params_dtype=None, parallel_mode=None, parameters_split=None, device='cuda', ub_overlap_ag=False, "
    "ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None, "
    "delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None"
)
_TE_VERSIONS = ("2.11.0", "2.20.2")
TE_LINEAR = tuple(
    Published("transformer-engine", version, "transformer_engine/pytorch/module/linear.py", "Linear.__init__",
              _TE_LINEAR) for version in _TE_VERSIONS
)  # fmt: skip
TE_AUTOCAST = tuple(
    Published("transformer-engine", version, "transformer_engine/pytorch/quantization.py", "fp8_autocast",
              "enabled=True, calibrating=False, fp8_recipe=None, fp8_group=None, _graph=False")
    for version in _TE_VERSIONS
)  # fmt: skip
TE_ADAM = tuple(
    Published("transformer-engine", version, "transformer_engine/pytorch/optimizers/fused_adam.py",
              "FusedAdam.__init__",
              "self, params, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, amsgrad=False, *, "
              "bias_correction=True, adam_w_mode=True, capturable=False, master_weights=False, "
              "master_weight_dtype=torch.float32, exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float32, "
              "use_decoupled_grad=False, store_param_remainders=False, set_grad_none=None")
    for version in _TE_VERSIONS
)  # fmt: skip
APEX_COMMIT = "NVIDIA/apex@004da4edfc08853393bfc8ef3e2436f652176f13"
APEX_ADAM = (
    Published(APEX_COMMIT, "read 2026-11-29", "apex/optimizers/fused_adam.py", "FusedAdam.__init__",
              "self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, "
              "weight_decay=0., amsgrad=False, set_grad_none=True, capturable=False, use_master=False"),
)  # fmt: skip
LIGER_LOSS = tuple(
    Published("liger-kernel", "0.8.5", "liger_kernel/transformers/fused_linear_cross_entropy.py",
              f"LigerFusedLinearCrossEntropyLoss.{method}", signature)
    for method, signature in (
        ("__init__", "self, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, "
                     "reduction='mean', softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False, "
                     "return_token_accuracy=False, return_predicted_tokens=False"),
        ("forward", "self, lin_weight, _input, target, bias=None"),
    )
)  # fmt: skip
LIGER_ROPE = Published(
    "liger-kernel", "0.8.5", "liger_kernel/transformers/rope.py", "liger_rotary_pos_emb",
    "q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None",
)  # fmt: skip
LIGER_SWIGLU = Published(
    "liger-kernel", "0.8.5", "liger_kernel/transformers/swiglu.py", "LigerSwiGLUMLP.forward", "self, x"
)
ALL = (
    *FLASH_ATTN_2,
    *FLASH_ATTN_3,
    *FLASH_ATTN_3_CACHE,
    *AITER,
    *TE_INIT,
    *TE_FORWARD,
    *TE_LINEAR,
    *TE_AUTOCAST,
    *TE_ADAM,
    *APEX_ADAM,
    *LIGER_LOSS,
    LIGER_ROPE,
    LIGER_SWIGLU,
)


def with_signature(published: Published, body: Any) -> Any:
    """A function with the published signature that calls body(arguments by name)."""
    scope: dict[str, Any] = {"body": body, "torch": torch}
    exec(f"def function({published.signature}):\n    return body(dict(locals()))", scope)
    return scope["function"]
