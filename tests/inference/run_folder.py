"""Generate from a Hugging Face folder with TP 2 x PP 2. Started by test_engine.py: run_folder.py FOLDER OUT.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from checkpoint_convert.engine import open_engine
from megatron_vlm.config import ParallelConfig
from tests.inference.run_ranks import CONFIG
from tests.inference.tiny_model import random_specs

NEW_TOKENS = 8


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    parallel = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    with open_engine(folder, CONFIG, parallel) as engine:
        if engine is not None:
            out.write_text(json.dumps(engine.generate([spec.prompt() for spec in random_specs(5, 40)], NEW_TOKENS)))


if __name__ == "__main__":
    main()
