"""Build this rank's model chunks from a recipe."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import megatron.core.package_info
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import Recipe, TrainingConfig
from megatron_vlm.config.training import DEFAULT_RECOMPUTE_MODULES
from megatron_vlm.model.vlm import VisionLanguageModel
from megatron_vlm.planner.balance import layers_per_stage
from megatron_vlm.runtime.device import current_device, on_gpu
from megatron_vlm.runtime.process_groups import vision_groups


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation, x * sigmoid(1.702 x). megatron-core's own would be compiled on a CPU too."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """SigLIP's activation, the tanh approximation of GELU."""
    return F.gelu(x, approximate="tanh")


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_pytorch_tanh": tanh_gelu}


def _shared_settings(recipe: Recipe) -> dict[str, Any]:
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    return {
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": recipe.training.bf16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # initialize.py samples the weights after building, so that they are the same in every parallel layout.
        "perform_initialization": False,
        "use_cpu_initialization": not on_gpu(),
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,  # mlp.py fuses them
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }


_FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _language_recompute(training: TrainingConfig) -> dict[str, Any]:
    if training.recompute_granularity == "selective":
        modules = list(training.recompute_modules or DEFAULT_RECOMPUTE_MODULES)
        return {"recompute_granularity": "selective", "recompute_modules": modules}
    if training.recompute_granularity != "full":  # `auto` is replaced before a run builds its model
        return {}
    layers = training.recompute_num_layers
    return _FULL_RECOMPUTE | ({"recompute_method": "block", "recompute_num_layers": layers} if layers else {})


def _vision_recompute(training: TrainingConfig) -> dict[str, Any]:
    """Of a frozen tower nothing is kept, so that there is nothing to recompute."""
    return _FULL_RECOMPUTE if training.recomputes_vision and "vision" in training.trainable else {}


def _pipeline_layout(recipe: Recipe) -> list[list[str]] | None:
    """megatron-core's layout of the stages where the recipe asks for one; without, layers are split equally."""
    parallel = recipe.parallel
    if parallel.pipeline_model_parallel_layout is None or parallel.pipeline_model_parallel_size == 1:
        return None
    stages = [["decoder"] * count for count in layers_per_stage(recipe)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def language_transformer_config(recipe: Recipe) -> TransformerConfig:
    """megatron-core's settings for the language model in the recipe's parallel layout."""
    language, parallel = recipe.model.language, recipe.parallel
    virtual = parallel.virtual_pipeline_model_parallel_size
    return TransformerConfig(
        num_layers=language.num_hidden_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.intermediate_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_key_value_heads,
        kv_channels=language.head_width,
        normalization=language.normalization,
        layernorm_epsilon=language.layer_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        bias_dropout_fusion=False,  # there are no biases, and a residual's addition is one kernel as it is
        add_qkv_bias=language.attention_bias,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_model_parallel_layout=_pipeline_layout(recipe),
        context_parallel_size=parallel.context_parallel_size,
        # With two stages the previous and the next rank are the same peer. Batched messages to it are silently matched
        # in the wrong order from the third micro-batch on, so the interleaved schedule sends them one by one.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
        # What a stage has sent is needed for its graph alone: without this its data stays until the row's backward.
        # megatron-core 0.16 frees it in the interleaved schedule before it is sent, and trains on garbage.
        deallocate_pipeline_outputs=virtual == 1 or megatron.core.package_info.MINOR >= 19,
        calculate_per_token_loss=True,
        fp8=recipe.training.fp8_format,
        fp8_recipe=recipe.training.fp8_recipe,
        **_language_recompute(recipe.training),
        **_shared_settings(recipe),
    )


def vision_transformer_config(recipe: Recipe) -> TransformerConfig:
    """megatron-core's settings for the vision tower, which has no pipeline or context parallelism."""
    vision, parallel = recipe.model.vision, recipe.parallel
    tensor_parallel = parallel.vision_parallel == "tensor"
    return TransformerConfig(
        num_layers=vision.num_layers_used,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        layernorm_epsilon=vision.layer_norm_eps,
        activation_func=_ACTIVATIONS[vision.hidden_act],
        bias_dropout_fusion=on_gpu(),  # bias and residual added in one kernel
        add_bias_linear=True,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size if tensor_parallel else 1,
        sequence_parallel=tensor_parallel and parallel.sequence_parallel,
        **_vision_recompute(recipe.training),
        **_shared_settings(recipe),
    )


def _with_kernels_of_this_machine(recipe: Recipe) -> Recipe:
    """A recipe that asks for no kernel: a checkpoint may come from a machine with others."""
    training = replace(
        recipe.training,
        attention_backend="auto",
        vision_attention_backend=None,
        transformer_impl="local",
        fp8_format=None,
    )
    return replace(recipe, training=training)


def build_model(
    recipe: Recipe, device: torch.device | None = None, *, for_training: bool = False
) -> list[VisionLanguageModel]:
    """Build this rank's model chunks: one, or one per virtual stage. The weights are uninitialised.

    Process groups must exist (runtime.launch) and the recipe must have passed check_recipe.

    Args:
        recipe: of the model and its parallel layout.
        device: this rank's own by default; on the meta device the model has names and shapes but no memory.
        for_training: use the kernels that the recipe names; otherwise those that work on this machine.

    Raises:
        ConfigError: `for_training`, and a kernel that the recipe names does not work here.
    """
    if not for_training:
        recipe = _with_kernels_of_this_machine(recipe)
    config, vision_config = language_transformer_config(recipe), vision_transformer_config(recipe)
    groups = vision_groups(recipe.parallel)
    virtual = recipe.parallel.virtual_pipeline_model_parallel_size
    chunks = []
    for chunk in range(virtual):
        stage = {"ignore_virtual": False, "vp_stage": chunk} if virtual > 1 else {"ignore_virtual": True}
        with device or nullcontext():
            model = VisionLanguageModel(
                config,
                vision_config,
                groups,
                recipe,
                pre_process=parallel_state.is_pipeline_first_stage(**stage),
                post_process=parallel_state.is_pipeline_last_stage(**stage),
                vp_stage=chunk if virtual > 1 else None,
            )
        chunks.append(model.to(device or current_device()))
    return chunks
