"""An exported `llava_next` folder in transformers 4.57 and 5.23, each in an environment without this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_vlm.config import ModelConfig
from tests.checkpoint_convert.huggingface.test_tiling_parity import PUBLISHED, assert_same, write_processor
from tests.checkpoint_convert.whole_model import picture
from tests.instellavl.exports import pictures, write_exports
from tests.support.environments import Environment
from tests.support.launch import ROOT


def in_environment(environment: Environment, folder: Path) -> dict[str, Any]:
    """The results of stock.py there."""
    done = environment.run(ROOT / "tests" / "checkpoint_convert" / "huggingface" / "stock.py", folder)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    with np.load(folder / "stock.npz") as found:
        return dict(found)


@pytest.mark.full
def test_both_versions_give_our_tiles_and_equal_logits(
    tmp_path: Path, inference: Environment, older: Environment
) -> None:
    write_exports(tmp_path)
    write_processor(tmp_path / "processor")
    table = {f"{size[0]}x{size[1]}": picture(size, seed) for seed, size in enumerate(PUBLISHED)}
    for folder, images in {"table": table, "images": pictures()}.items():
        (tmp_path / folder).mkdir()
        for name, image in images.items():
            image.save(tmp_path / folder / f"{name}.png")
    newer, old = in_environment(inference, tmp_path), in_environment(older, tmp_path)
    assert (str(newer["version"]), str(old["version"])) == ("5.23.0", "4.57.6")
    for found in (newer, old):
        for name, image in table.items():
            assert_same(image, ModelConfig(), found[f"tiles {name}"], int(found[f"image_tokens {name}"]))
    prompts = [f"logits {name}" for name in [*pictures(), "text"]]
    assert len({newer[name].tobytes() for name in prompts}) == len(prompts)
    for name in prompts:
        assert np.abs(newer[name] - old[name]).max() < 1e-5, name
