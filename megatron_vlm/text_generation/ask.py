"""`megatron-vlm ask MODEL "question"`: one answer, without a server.

megatron-vlm ask runs/demo/hf --image shape.png "what color is the shape?"
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vlm.commands.chat_client import printable
from megatron_vlm.commands.number_flags import positive_int
from megatron_vlm.config import InferenceConfig, ParallelConfig, check_inference
from megatron_vlm.text_generation.arguments import add_engine_arguments, check_world_size, engine_settings
from megatron_vlm.text_generation.failures import report_failure

if TYPE_CHECKING:
    from PIL import Image


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a Megatron checkpoint or a Hugging Face folder")
    parser.add_argument("question", help="images come before it")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE", help="may be repeated")
    parser.add_argument(
        "--max-tokens", type=positive_int, default=256, metavar="N", help="tokens of the answer at most [256]"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy decoding [0]")
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="sample from the N most likely tokens; 0: all"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample from the most likely tokens [1]")
    parser.add_argument("--seed", type=int, metavar="N", help="makes a sampled answer repeatable")
    add_engine_arguments(parser)
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0; 2 if an argument, the model or an image is wrong; 1 after any other error."""
    options = _parser(prog).parse_args(argv)
    config, parallel = engine_settings(options)
    try:
        check_inference(config)
        check_world_size(parallel)
        _ask(options, config, parallel)
    except Exception as error:
        return report_failure(error)
    return 0


# torch is imported by the functions below only: --help and wrong flags are answered at once.


def _ask(options: argparse.Namespace, config: InferenceConfig, parallel: ParallelConfig) -> None:
    from checkpoint_convert.engine import open_engine
    from megatron_vlm.data.errors import DataError
    from megatron_vlm.data.processing.conversation import IMAGE_PLACEHOLDER, Turn
    from megatron_vlm.inference.request import Prompt, SamplingParams

    if IMAGE_PLACEHOLDER in options.question:
        raise DataError(
            f"the question has {IMAGE_PLACEHOLDER}, which stands for an image: remove it. Images that are given with "
            "--image come before the question."
        )
    images = [_read_image(file) for file in options.image]
    marks = f"{IMAGE_PLACEHOLDER}\n" * len(images)
    prompt = Prompt([Turn("human", marks + options.question)], images)
    with open_engine(options.model, config, parallel) as engine:
        if engine is None:  # not on this rank
            return
        try:
            params = SamplingParams(
                max_new_tokens=options.max_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                seed=options.seed,
            )
            handle = engine.submit(prompt, params)
        except ValueError as error:
            raise DataError(str(error)) from error
        for output in handle:
            print(printable(output.text_delta), end="", flush=True)
        print(flush=True)


def _read_image(file: Path) -> Image.Image:
    from megatron_vlm.data.errors import DataError
    from megatron_vlm.data.processing.image_io import ImageUnreadable, decode_image

    try:
        return decode_image(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}. Give an image file with --image.") from error
    except ImageUnreadable as error:
        raise DataError(f"{file}: {error}. Give another file with --image.") from error


if __name__ == "__main__":
    sys.exit(main())
