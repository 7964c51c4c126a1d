"""A generation engine for any whole model: a Megatron checkpoint, or a Hugging Face folder without converting it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from checkpoint_convert.errors import ConversionError
from checkpoint_convert.huggingface.tokenizer import check_image_token, import_tokenizer
from checkpoint_convert.mapping.param_map import MegatronTensors, param_map
from checkpoint_convert.megatron.files import fill_model, imported_recipe
from checkpoint_convert.model_source import MEGATRON, open_source
from megatron_vlm.config import InferenceConfig, ParallelConfig
from megatron_vlm.inference.engine import Engine
from megatron_vlm.inference.load import engine_on_ranks, load_engine
from megatron_vlm.runtime.device import on_gpu


@contextmanager
def open_engine(
    folder: Path,
    config: InferenceConfig | None = None,
    parallel: ParallelConfig | None = None,
    timeout_minutes: int = 10,
) -> Iterator[Engine | None]:
    """An engine for the model in `folder`; usable inside the block, as that of load_engine.

    Args:
        folder: a Megatron checkpoint, whose weights keep the dtype of the training; or a `llava_next`,
            `llava_onevision` or `instellavl` folder, whose weights become bfloat16 on a GPU and float32 on a CPU.
        config: sizes of the engine.
        parallel: parallel layout of the engine.
        timeout_minutes: how long ranks wait for each other.

    Raises:
        ConversionError: the folder is no whole model, or cannot be read.
        CheckpointError, DataError, ConfigError: as in load_engine.
    """
    source = open_source(folder)
    if source.format == MEGATRON:
        with load_engine(folder, config, parallel, timeout_minutes) as engine:
            yield engine
        return
    if source.model is None:
        raise ConversionError(
            f"{folder} ({source.format}) has only {', '.join(source.parts)}: answers need a whole model. Combine the "
            "parts with megatron-vlm import or megatron-vlm merge, and give what that writes"
        )
    recipe = imported_recipe(source.model, source.aspect_ratio, str(folder))
    recipe.parallel = parallel or ParallelConfig()
    recipe.training.bf16 = on_gpu()
    tensors = MegatronTensors(param_map(source.model), source.tensors, str(folder))
    with TemporaryDirectory() as temporary:
        tokenizer = import_tokenizer(folder, Path(temporary) / "tokenizer")
        check_image_token(tokenizer, source.model, str(folder))
        with engine_on_ranks(
            recipe, tokenizer, lambda chunks: fill_model(chunks, tensors), config, timeout_minutes
        ) as engine:
            yield engine
