"""Answer the easy-VQA test questions with an exported model and stock transformers, without this project's packages.

python examples/instellavl/demo/evaluate.py --model runs/demo/hf --annotations runs/demo/data/test.json
    --image-folder runs/demo/data/images --output runs/demo/answers.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration

BATCH_SIZE = 256
MAX_NEW_TOKENS = 8


class Question(NamedTuple):
    """One test question."""

    text: str
    truth: str
    image: str


def read_questions(annotations: Path) -> list[Question]:
    """The question of each entry."""
    entries = json.loads(annotations.read_text(encoding="utf-8"))
    return [
        Question(
            entry["conversations"][0]["value"].removeprefix("<image>\n"),
            entry["conversations"][1]["value"],
            entry["image"],
        )
        for entry in entries
    ]


def question_type(truth: str) -> str:
    """`yes/no`, `shape` or `colour`."""
    if truth in ("yes", "no"):
        return "yes/no"
    return "shape" if truth in ("circle", "rectangle", "triangle") else "colour"


class Model:
    """The exported model. Each image is encoded only once for all its questions."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = LlavaNextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.features: dict[str, torch.Tensor] = {}

    @torch.inference_mode()
    def encode_images(self, names: list[str], folder: Path) -> None:
        """Compute the features [image tokens, hidden size] of each image."""
        for start in range(0, len(names), BATCH_SIZE):
            batch = names[start : start + BATCH_SIZE]
            images = [Image.open(folder / name).convert("RGB") for name in batch]
            inputs = self.processor.image_processor(images=images, return_tensors="pt")
            features = self.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
            self.features.update(zip(batch, features, strict=True))

    @torch.inference_mode()
    def answer(self, questions: list[Question]) -> list[str]:
        """Answer questions about encoded images, with greedy decoding and a KV cache."""
        answers = [""] * len(questions)
        order = sorted(range(len(questions)), key=lambda index: len(questions[index].text))
        for start in range(0, len(order), BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            for index, text in zip(batch, self._answer_batch([questions[index] for index in batch]), strict=True):
                answers[index] = text.strip()
        return answers

    def _answer_batch(self, questions: list[Question]) -> list[str]:
        features = [self.features[question.image] for question in questions]
        prompts = []
        for question, image_features in zip(questions, features, strict=True):
            content = [{"type": "image"}, {"type": "text", "text": question.text}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            prompts.append(prompt.replace("<image>", "<image>" * len(image_features)))
        inputs = self.processor.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        embeddings = self.model.get_input_embeddings()(inputs["input_ids"])
        is_image_token = (inputs["input_ids"] == self.model.config.image_token_index).unsqueeze(-1)
        ids = self.model.generate(
            inputs_embeds=embeddings.masked_scatter(is_image_token, torch.cat(features)),
            attention_mask=inputs["attention_mask"],
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        return self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)


def shuffle_images(questions: list[Question], seed: int = 0) -> list[Question]:
    """The same questions and true answers with permuted images."""
    images = [question.image for question in questions]
    random.Random(seed).shuffle(images)
    return [question._replace(image=image) for question, image in zip(questions, images, strict=True)]


def accuracy(questions: list[Question], answers: list[str]) -> float:
    """Percent of answers that are exactly right."""
    right = sum(question.truth == answer for question, answer in zip(questions, answers, strict=True))
    return 100 * right / len(questions)


def majority_baseline(questions: list[Question]) -> float:
    """Accuracy in percent of always giving the most frequent answer."""
    return 100 * max(Counter(question.truth for question in questions).values()) / len(questions)


def wording_baseline(questions: list[Question]) -> float:
    """The best accuracy in percent that is possible without images: for each wording, its most frequent true answer."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        answers[question.text][question.truth] += 1
    return 100 * sum(max(counts.values()) for counts in answers.values()) / len(questions)


def indices_by_type(questions: list[Question]) -> dict[str, list[int]]:
    """Question type -> indices of its questions, in alphabetical order."""
    by_type: defaultdict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        by_type[question_type(question.truth)].append(index)
    return dict(sorted(by_type.items()))


def report(questions: list[Question], answers: list[str], shuffled: list[str]) -> list[str]:
    """Lines of the result table; the last line is the overall result.

    `baseline` always gives the most frequent answer, `wording` the most frequent answer to each question's words, and
    `margin` is what the model has above that.
    """
    titles = f"{'accuracy':>9} {'baseline':>9} {'wording':>9} {'margin':>7} {'images shuffled':>16}"
    lines = [f"{'type':<8} {'questions':>9} {titles}"]
    for name, indices in [*indices_by_type(questions).items(), ("all", list(range(len(questions))))]:
        asked = [questions[index] for index in indices]
        right, blind = (accuracy(asked, [given[index] for index in indices]) for given in (answers, shuffled))
        wording = wording_baseline(asked)
        lines.append(
            f"{name:<8} {len(asked):>9,} {right:>7.1f} % {majority_baseline(asked):>7.1f} % {wording:>7.1f} % "
            f"{right - wording:>+7.1f} {blind:>14.1f} %"
        )
    overall, baseline = accuracy(questions, answers), majority_baseline(questions)
    return [*lines, f"test accuracy {overall:.1f} % (baseline {baseline:.1f} %)"]


def confusion(questions: list[Question], answers: list[str]) -> list[str]:
    """For each type, how often each answer was given (columns) to the questions with each true answer (rows)."""
    lines = []
    for name, indices in indices_by_type(questions).items():
        counts = Counter((questions[index].truth, answers[index]) for index in indices)
        truths = sorted({truth for truth, _ in counts})
        width = max(map(len, (*truths, "other"))) + 1
        lines += ["", f"{name}: true answer, and how often each answer was given"]
        lines.append(" " * width + "".join(f"{given:>{width}}" for given in (*truths, "other")))
        for truth in truths:
            row = [counts[truth, given] for given in truths]
            other = sum(count for (true, _), count in counts.items() if true == truth) - sum(row)
            lines.append(f"{truth:<{width}}" + "".join(f"{count:>{width},}" for count in (*row, other)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="exported llava_next folder")
    parser.add_argument("--annotations", type=Path, required=True, metavar="FILE", help="questions and true answers")
    parser.add_argument("--image-folder", type=Path, required=True, metavar="DIR", help="root of the image paths")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON file for the answers")
    parser.add_argument("--report", type=Path, metavar="FILE", help="text file for what is printed")
    options = parser.parse_args()
    questions = read_questions(options.annotations)
    model = Model(options.model)
    model.encode_images(sorted({question.image for question in questions}), options.image_folder)
    answers = model.answer(questions)
    # Accuracy with the wrong images shows how much the answers depend on the images.
    shuffled = model.answer(shuffle_images(questions))
    if options.output:
        rows = [{**question._asdict(), "answer": text} for question, text in zip(questions, answers, strict=True)]
        options.output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    *table, overall = report(questions, answers, shuffled)
    printed = "\n".join([*table, *confusion(questions, answers), "", overall])
    if options.report:
        options.report.write_text(printed + "\n", encoding="utf-8")
    print(printed)


if __name__ == "__main__":
    main()
