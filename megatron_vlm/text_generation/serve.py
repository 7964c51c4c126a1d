"""`megatron-vlm serve MODEL`: a text-generation server for a Megatron checkpoint or a Hugging Face folder.

megatron-vlm serve run --port 5000
torchrun --nproc-per-node 2 --no-python megatron-vlm serve run --tensor-model-parallel-size 2

It answers Megatron-LM's PUT /api, OpenAI's /v1/chat/completions and /v1/completions, and has a chat page at /.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_vlm.commands.number_flags import number_from_0, positive_int, positive_number
from megatron_vlm.config import ConfigError, check_inference
from megatron_vlm.text_generation.arguments import add_engine_arguments, check_world_size, engine_settings
from megatron_vlm.text_generation.failures import report_failure


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="the folder of the model")
    parser.add_argument("--load", type=Path, metavar="MODEL", help="the same, under Megatron-LM's name")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all [127.0.0.1]")
    parser.add_argument("--port", type=int, default=5000, metavar="N", help="0 takes a free one [5000]")
    parser.add_argument("--served-model-name", metavar="NAME", help="the model's name for clients [the folder's]")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="accept only clients with a key of this file")
    parser.add_argument(
        "--default-max-tokens", type=positive_int, default=256, metavar="N", help="new tokens of a chat [256]"
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-images", type=positive_int, default=16, metavar="N", help="images of a request [16]")
    limits.add_argument(
        "--max-megapixels", type=positive_number, default=40, metavar="X", help="of a request's images [40]"
    )
    limits.add_argument(
        "--max-request-mb", type=positive_number, default=32, metavar="X", help="size of a request in MiB [32]"
    )
    limits.add_argument(
        "--request-timeout", type=positive_number, default=60, metavar="S", help="for a request to arrive [60]"
    )
    limits.add_argument(
        "--shutdown-timeout", type=number_from_0, default=60, metavar="S", help="for running requests [60]"
    )
    limits.add_argument(
        "--allow-remote-images", action="store_true", help="fetch images from http(s) addresses of the public internet"
    )
    add_engine_arguments(parser)
    return parser


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Exit code: 0 after SIGTERM or Ctrl-C, 2 for wrong flags or a wrong folder, 1 if the engine failed."""
    parser = _parser(prog)
    options = parser.parse_args(argv)
    folder = options.load or options.model
    if folder is None or (options.load and options.model):
        parser.error("give one model: megatron-vlm serve MODEL")
    if not 0 <= options.port < 65536:
        parser.error(f"--port {options.port} is not in 0..65535")
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        print(f"the server needs {error.name}: pip install 'megatron-vlm[serve]'", file=sys.stderr)
        return 2
    return _serve(folder, options)


def _serve(folder: Path, options: argparse.Namespace) -> int:
    """Not before the flags are known to be right: torch is imported here."""
    from checkpoint_convert.engine import open_engine
    from megatron_vlm.inference.server.process import ServerProcess, follow
    from megatron_vlm.inference.server.settings import ServerSettings

    config, parallel = engine_settings(options)
    try:
        check_inference(config)
        check_world_size(parallel)
        opened = open_engine(folder, config, parallel)
        if os.environ.get("RANK", "0") != "0":
            follow(opened)
            return 0
        settings = ServerSettings(
            model_name=options.served_model_name or folder.resolve().name or "model",
            host=options.host,
            port=options.port,
            api_keys=_api_keys(options.api_key_file),
            default_max_tokens=options.default_max_tokens,
            allow_remote_images=options.allow_remote_images,
            max_images=options.max_images,
            max_image_pixels=round(options.max_megapixels * 1e6),
            max_request_bytes=round(options.max_request_mb * 2**20),
            request_timeout=options.request_timeout,
            shutdown_timeout=options.shutdown_timeout,
        )
        try:
            process = ServerProcess(settings)
        except OSError as error:
            print(
                f"cannot listen on {options.host} port {options.port}: {error.strerror or error}. Give another --port "
                "or --host.",
                file=sys.stderr,
            )
            return 2
        process.run(opened)
        return 0
    except Exception as error:
        return report_failure(error)


def _api_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return ()
    try:
        keys = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"api_key_file {file} cannot be read: {error}. Give a text file.") from error
    if not keys:
        raise ConfigError(f"api_key_file {file} has no key: write one per line.")
    return keys


if __name__ == "__main__":
    sys.exit(main())
