"""Comparison of two sources that should hold the same samples."""

from __future__ import annotations

from megatron_vlm.data.sources.sample_source import SampleSource


def assert_same_samples(source: SampleSource, expected: SampleSource) -> None:
    """Ids, turns, image sizes and the bytes of the images are equal."""
    assert len(source) == len(expected)
    for index in range(len(expected)):
        a, b = source.sample(index), expected.sample(index)
        assert (a.id, a.turns, a.measure_images()) == (b.id, b.turns, b.measure_images())
        assert source.metadata(index).turns == b.turns
        assert len(a.image_names) == len(b.image_names)
        assert all(a.read_image(i) == b.read_image(i) for i in range(len(b.image_names)))
