"""Ranges of tiling resolutions in YAML and on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.config import ConfigError, load_recipe, parse_command_line
from megatron_vlm.config.pinpoints import expand_pinpoints


def test_range() -> None:
    assert expand_pinpoints("(1x1),...,(2x3)", 10) == [[10, 10], [10, 20], [10, 30], [20, 10], [20, 20], [20, 30]]
    assert len(expand_pinpoints("(1x1),…,(6x6)", 384)) == 36
    assert expand_pinpoints(" (2x1), ..., (2x1) ", 336) == [[672, 336]]
    for text in ("(1x1)", "1x1,...,2x2", "(2x1),...,(1x1)", "(0x1),...,(1x1)", ""):
        with pytest.raises(ValueError, match="range"):
            expand_pinpoints(text, 336)


def test_in_a_recipe_before_or_after_the_tile_size(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text('model:\n  image_grid_pinpoints: "(1x1),...,(1x2)"\n  vision: {image_size: 384}\n')
    assert load_recipe(path).model.image_grid_pinpoints == [[384, 384], [384, 768]]
    path.write_text('model: {image_grid_pinpoints: "all"}')
    with pytest.raises(ConfigError, match=r"r.yaml: model.image_grid_pinpoints: expected a list of .* got 'all'"):
        load_recipe(path)


def test_on_the_command_line() -> None:
    recipe, _ = parse_command_line(["--model.image-grid-pinpoints", "(1x1),...,(2x1)"])
    assert recipe.model.image_grid_pinpoints == [[336, 336], [672, 336]]
