"""Settings of a run: typed dataclasses, read from YAML and the command line, and checked before a model is built.

Nothing here may import torch, megatron-core or another package of the project.
"""

from megatron_vlm.config.checks.inference import check_inference
from megatron_vlm.config.checks.recipe import check_paths, check_recipe
from megatron_vlm.config.command_line import parse_command_line
from megatron_vlm.config.data import DataConfig
from megatron_vlm.config.errors import ConfigError
from megatron_vlm.config.inference import InferenceConfig
from megatron_vlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.parallel import ParallelConfig
from megatron_vlm.config.recipe import Recipe, load_recipe, recipe_from_dict, recipe_to_dict
from megatron_vlm.config.training import PARTS, TrainingConfig

__all__ = [
    "PARTS",
    "ConfigError",
    "DataConfig",
    "InferenceConfig",
    "LanguageConfig",
    "ModelConfig",
    "ParallelConfig",
    "Recipe",
    "TrainingConfig",
    "VisionConfig",
    "check_inference",
    "check_paths",
    "check_recipe",
    "load_recipe",
    "parse_command_line",
    "recipe_from_dict",
    "recipe_to_dict",
]
