"""The command `megatron-vlm`: one sub-command for each thing that can be done with data, training and checkpoints.

A sub-command's module is imported only when it is called, so that `--help` is fast and the data commands run without
megatron-core.
"""

from __future__ import annotations

import difflib
import importlib
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import megatron_vlm
from megatron_vlm.config import ConfigError, Recipe

PROGRAM = "megatron-vlm"


@dataclass(frozen=True)
class Command:
    """A sub-command: `main(arguments, prog)` of `module`, which returns the exit code."""

    module: str
    help: str
    arguments: tuple[str, ...] = ()
    """Put in front of the arguments that the user gives."""
    takes_model: bool = False
    """Whether `main` also takes `complete`: settings that are not given come from --pretrained-checkpoint, as in train.
    The data commands get it from here, because conversion stands above them."""


GROUPS = {
    "data": {
        "convert-dataset": Command(
            "megatron_vlm.commands.convert_dataset",
            "question answering, captions, OCR, ... -> LLaVA annotations",
        ),
        "prepare-shards": Command(
            "megatron_vlm.commands.prepare_shards",
            "annotations and images -> MDS shards, in a folder or on S3",
        ),
        "upload-shards": Command(
            "megatron_vlm.commands.upload_shards",
            "shards -> S3, verified and restartable",
        ),
        "data-report": Command(
            "megatron_vlm.commands.data_report",
            "one HTML page about the data: lengths, tiles, rows, suspicious samples",
            takes_model=True,
        ),
        "show-sample": Command(
            "megatron_vlm.commands.show_sample",
            "one sample as the model sees it: ids, labels, tiles",
            takes_model=True,
        ),
        "make-data-folders": Command(
            "megatron_vlm.commands.make_data_folders",
            "folders for the published data sets, and where to get these",
        ),
    },
    "training": {
        "init": Command(
            "megatron_vlm.new_recipe.init",
            "data and a model -> a recipe with comments, checked",
        ),
        "plan": Command(
            "megatron_vlm.train",
            "what train would do: parallel layout, rows, samples per step, epochs",
            ("--dry-run",),
        ),
        "plan-layout": Command(
            "megatron_vlm.commands.plan_layout",
            "parallel layouts that fit on some GPUs, fastest first: memory, time, MFU",
        ),
        "train": Command(
            "megatron_vlm.train",
            "train the model of a recipe, on one device or under torchrun",
        ),
    },
    "conversion": {
        "import": Command(
            "checkpoint_convert.hf_to_megatron",
            "Hugging Face folders -> a checkpoint to train from",
        ),
        "export": Command(
            "checkpoint_convert.megatron_to_hf",
            "a checkpoint -> a Hugging Face folder",
        ),
        "merge": Command(
            "checkpoint_convert.merge",
            "vision tower, projector and language model of several checkpoints -> one",
        ),
        "verify": Command(
            "checkpoint_convert.verify",
            "are two checkpoints the same model? weights, settings, logits, greedy tokens",
        ),
    },
    "inference": {
        "serve": Command(
            "megatron_vlm.text_generation.serve",
            "a text-generation server: OpenAI's and Megatron-LM's protocols, a chat page",
        ),
        "chat": Command(
            "megatron_vlm.commands.chat_client",
            "talk to a server in the terminal",
        ),
        "ask": Command(
            "megatron_vlm.text_generation.ask",
            "one answer from a checkpoint or a Hugging Face folder, without a server",
        ),
    },
    "evaluation": {
        "benchmark-table": Command(
            "megatron_vlm.commands.benchmark_table",
            "scores of lmms-eval beside the published ones",
        ),
    },
}

_EXAMPLES = f"""\
examples
  {PROGRAM} prepare-shards --annotations train.json --image-folder images --output shards
  {PROGRAM} plan --config recipe.yaml --data-path shards
  {PROGRAM} train --config recipe.yaml --data-path shards --save run
  torchrun --nproc-per-node 8 --no-python {PROGRAM} train --config recipe.yaml --save run
  {PROGRAM} export --load run --save hf --format llava_next
  {PROGRAM} ask hf --image photo.jpg "What is this?"
  {PROGRAM} serve hf --port 5000

{PROGRAM} COMMAND --help describes a command. {PROGRAM} --version lists versions."""


def help_text() -> str:
    """All sub-commands by group, one line each."""
    lines = [f"usage: {PROGRAM} COMMAND [ARGUMENT ...]", "", "Train vision-language models with megatron-core."]
    for group, commands in GROUPS.items():
        lines += ["", group, *(f"  {name:<18} {command.help}" for name, command in commands.items())]
    return "\n".join([*lines, "", _EXAMPLES])


def version_text() -> str:
    """This package's version, and those of the packages that results depend on."""
    versions = [f"{PROGRAM} {megatron_vlm.__version__}", f"Python {platform.python_version()}"]
    for package in ("torch", "megatron-core", "transformers"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} not installed")
    return ", ".join(versions)


def main(argv: list[str] | None = None) -> int:
    """Exit code: that of the sub-command; 2 if there is none of that name, or a package that it needs is missing."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(version_text())
        return 0
    name, rest = arguments[0], arguments[1:]
    commands = {name: command for group in GROUPS.values() for name, command in group.items()}
    if name not in commands:
        nearest = difflib.get_close_matches(name, commands, n=1)
        remedy = f"Did you mean {nearest[0]}?" if nearest else f"All commands: {PROGRAM} --help"
        print(f"{PROGRAM}: there is no command {name!r}. {remedy}", file=sys.stderr)
        return 2
    command = commands[name]
    try:
        module = importlib.import_module(command.module)
    except ImportError as error:
        if error.name is not None:  # not one of ours, which say what to install
            raise
        print(f"{PROGRAM} {name}: {error}", file=sys.stderr)
        return 2
    more = {"complete": _complete} if command.takes_model else {}
    return module.main([*command.arguments, *rest], prog=f"{PROGRAM} {name}", **more)


def _complete(recipe: Recipe, given: set[str]) -> None:
    """Take what the user did not set from the model that training starts from."""
    from checkpoint_convert.model_config import complete_recipe

    try:
        complete_recipe(recipe, given)
    except ImportError as error:  # a Megatron checkpoint, where megatron-core is not installed
        if error.name is not None:
            raise
        raise ConfigError(f"training.pretrained_checkpoint: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
