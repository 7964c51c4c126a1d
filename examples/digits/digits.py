"""scikit-learn's digits as images and two tables of questions: train.csv and test.csv.

python digits.py

1,797 images of 8 x 8 pixels, written by hand, in scikit-learn's package (UCI's handwritten digits).
A quarter is held out for the test. Each training image comes in nine versions, shifted by up to one pixel.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
QUESTIONS = ("Which digit is this?", "What is this digit called?", "Is this digit even or odd?")
CENTRE, SHIFTS = (1, 1), [(down, right) for down in range(3) for right in range(3)]


def answer(digit: int, question: str) -> str:
    return dict(zip(QUESTIONS, (str(digit), WORDS[digit], ("even", "odd")[digit % 2]), strict=True))[question]


def save_image(pixels: np.ndarray, shift: tuple[int, int], file: Path) -> None:
    """Write `pixels` [8, 8], of 0 to 16, with a margin of one pixel on average, four times as large."""
    page = np.zeros((10, 10), np.uint8)
    page[shift[0] : shift[0] + 8, shift[1] : shift[1] + 8] = np.minimum(pixels * 16, 255)
    Image.fromarray(page.repeat(4, axis=0).repeat(4, axis=1)).save(file)


def main() -> None:
    images, digits = load_digits().images, load_digits().target.tolist()
    train, test = train_test_split(range(len(digits)), test_size=0.25, random_state=0, stratify=digits)
    Path("images").mkdir(exist_ok=True)
    for name, numbers, shifts in (("train", train, SHIFTS), ("test", test, [CENTRE])):
        rows = []
        for number in numbers:
            for version, shift in enumerate(shifts):
                file = f"{number}-{version}.png"
                save_image(images[number], shift, Path("images", file))
                # Of a version in training one question, of an image in the test all.
                asked = QUESTIONS if name == "test" else [QUESTIONS[(number + version) % len(QUESTIONS)]]
                rows += [(file, question, answer(digits[number], question)) for question in asked]
        with open(f"{name}.csv", "w", newline="") as table:
            csv.writer(table).writerows([("image", "question", "answer"), *rows])
        print(f"{len(rows):,} questions -> {name}.csv")


if __name__ == "__main__":
    main()
