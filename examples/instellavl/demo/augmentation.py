"""More training images from one of easy-VQA: its shape at other positions, and mirrored."""

from __future__ import annotations

import random
from collections import Counter

from PIL import Image, ImageChops, ImageOps

Colour = tuple[int, ...]


def move_shape(image: Image.Image, rng: random.Random) -> Image.Image:
    """A copy of an RGB image with its shape at a random position, mirrored from left to right half of the times.

    Neither changes an answer: no question is about positions, and all three shapes are symmetric. The shape is what
    differs from the background, the colour of most corners.
    """
    background = _background(image)
    empty = Image.new("RGB", image.size, background)
    box = ImageChops.difference(image, empty).getbbox()
    if box is None:
        return empty
    shape = image.crop(box)
    if rng.random() < 0.5:
        shape = ImageOps.mirror(shape)
    left, top = (rng.randint(0, image.size[axis] - shape.size[axis]) for axis in (0, 1))
    empty.paste(shape, (left, top))
    return empty


def _background(image: Image.Image) -> Colour:
    right, bottom = image.width - 1, image.height - 1
    corners: Counter[Colour] = Counter()
    for position in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        colour = image.getpixel(position)
        assert isinstance(colour, tuple)
        corners[colour] += 1
    return corners.most_common(1)[0][0]
