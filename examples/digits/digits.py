"""scikit-learn's digits as images and two tables of questions: train.csv and test.csv.

python digits.py

1,797 images of 8 x 8 pixels, written by hand, in scikit-learn's package (UCI's handwritten digits). A quarter is held
out for the test. Each training image comes in twenty versions: a little turned, shifted, larger or smaller.
"""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = ("Which digit is this?", "What is this digit called?", "Is this digit even or odd?")
VERSIONS = 20
DEGREES, PIXELS, ZOOM = 15, 1, 0.15
"""By which a version differs from the image at most."""
SCALE, SIDE = 4, 40
"""Pixels of the file for a pixel of the image, and of the file's side: a margin of one pixel around the digit."""


def answer(digit: int, question: str) -> str:
    return dict(zip(QUESTIONS, (str(digit), WORDS[digit], ("even", "odd")[digit % 2]), strict=True))[question]


def enlarged(pixels: np.ndarray) -> Image.Image:
    """The image [8, 8], of 0 to 16, four times as large, with a margin."""
    page = np.zeros((10, 10), np.uint8)
    page[1:9, 1:9] = np.minimum(pixels * 16, 255)
    return Image.fromarray(page.repeat(SCALE, axis=0).repeat(SCALE, axis=1))


def version_of(image: Image.Image, rng: random.Random) -> Image.Image:
    """The image turned around its centre, shifted and zoomed, each at random."""
    angle, zoom = math.radians(rng.uniform(-DEGREES, DEGREES)), rng.uniform(1 - ZOOM, 1 + ZOOM)
    right, down = (SIDE / 2 + rng.uniform(-PIXELS, PIXELS) * SCALE for _ in range(2))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    # From a pixel of the version to its pixel in the image.
    x, y = SIDE / 2 - cos * right - sin * down, SIDE / 2 + sin * right - cos * down
    return image.transform(image.size, Image.Transform.AFFINE, (cos, sin, x, -sin, cos, y), Image.Resampling.BILINEAR)


def main() -> None:
    images, digits = load_digits().images, load_digits().target.tolist()
    train, test = train_test_split(range(len(digits)), test_size=0.25, random_state=0, stratify=digits)
    Path("images").mkdir(exist_ok=True)
    rng = random.Random(0)
    for name, numbers in (("train", train), ("test", test)):
        rows = []
        for number in numbers:
            image = enlarged(images[number])
            for version in range(VERSIONS if name == "train" else 1):
                file = f"{number}-{version}.png"
                (version_of(image, rng) if name == "train" else image).save(Path("images", file))
                # Of a version in training one question, of an image in the test all.
                asked = QUESTIONS if name == "test" else [QUESTIONS[(number + version) % len(QUESTIONS)]]
                rows += [(file, question, answer(digits[number], question)) for question in asked]
        with open(f"{name}.csv", "w", newline="") as table:
            csv.writer(table).writerows([("image", "question", "answer"), *rows])
        print(f"{len(rows):,} questions -> {name}.csv")


if __name__ == "__main__":
    main()
