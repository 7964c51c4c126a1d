"""Run with any version of transformers: the published snippets and stock transformers on two exports of one model.

python tests/instellavl/answer.py FOLDER with FOLDER/instellavl, FOLDER/llava_next and FOLDER/images/*.png; writes
FOLDER/answers.json. Needs transformers, torch, Pillow and the package instellavl.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SNIPPETS = Path(__file__).parent / "snippets"
MODEL_ID = '"amd/Instella-VL-1B"'
LOCAL_PATH = "'<path/to/model-checkpoint-saved-locally>'"
LOCAL_IMAGE = "'/path/to/InstellaVL-repo/assets/images/example2_dog.jpg'"
IMPORTS = "from instellavl.mm_utils import process_images, tokenizer_image_token, get_model_name_from_path"
LOGIN = """# Login into HF Hub
from huggingface_hub import login
login(token = "<Your HFtoken id>") # Enter your token 
"""  # noqa: W291
WITHOUT_IMAGE = (
    ("image = load_image(image_file)", ""),
    ("process_images([image]", "process_images([]"),
    ("preprocess(image,", "preprocess([],"),
    ('question = DEFAULT_IMAGE_TOKEN + "\\n" + query', "question = query"),
    ("[image.size]", "[]"),
)
"""Edits that the snippet's own comment describes: no image, and `question = text`."""
QUESTIONS = {"hugging_face": "Describe the image.", "local_checkpoint": "Describe this image."}


def run_snippet(name: str, *edits: tuple[str, str]) -> Any:
    """Run a published snippet with some of its text replaced; returns its variables."""
    text = (SNIPPETS / f"{name}.txt").read_text(encoding="utf-8")
    for old, new in (("'cuda'", "'cpu'"), ("do_sample=True", "do_sample=False"), *edits):
        assert old in text, f"{old} is not in the snippet {name}"
        text = text.replace(old, new)
    variables: dict[str, Any] = {}
    exec(compile(text, name, "exec"), variables)
    return variables


def hugging_face(folder: Path, image: Path | None) -> str:
    """The answer of "Load Model from Huggingface"."""
    path = repr(str(folder / "instellavl"))
    load = "None" if image is None else f"load_image({str(image)!r})"
    variables = run_snippet("hugging_face", (MODEL_ID, path), ('load_image("path/to/your_image")', load))
    answer: str = variables["outputs"]
    return answer


def local_checkpoint(folder: Path, image: Path | None, *edits: tuple[str, str]) -> str:
    """The answer of "Loading from locally saved checkpoint"."""
    variables = run_snippet(
        "local_checkpoint",
        (LOCAL_PATH, repr(str(folder / "instellavl"))),
        (LOGIN, ""),
        (IMPORTS, f"{IMPORTS}, KeywordsStoppingCriteria"),
        *(WITHOUT_IMAGE if image is None else [(LOCAL_IMAGE, repr(str(image)))]),
        *edits,
    )
    answer: str = variables["outputs"]
    return answer


class Stock:
    """The `llava_next` export in stock transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoProcessor, LlavaNextForConditionalGeneration

        self.model, report = LlavaNextForConditionalGeneration.from_pretrained(
            folder / "llava_next", output_loading_info=True
        )
        assert not any(report.values()), report
        self.processor = AutoProcessor.from_pretrained(folder / "llava_next")

    def answer(self, question: str, image: Path | None) -> str:
        """The greedy answer, with special tokens."""
        from PIL import Image

        text = question if image is None else f"<image>\n{question}"
        prompt = self.processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        images = None if image is None else [Image.open(image).convert("RGB")]
        inputs = self.processor(images=images, text=prompt, return_tensors="pt")
        ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=1024)
        answer: str = self.processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
        return answer.strip()


def batch(folder: Path, images: list[Path | None]) -> list[str]:
    """Answers to one question about each image, all from one `generate` of the remote code."""
    from PIL import Image
    from transformers import AutoModelForCausalLM, AutoProcessor

    path = folder / "instellavl"
    model, report = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    pictures = [None if image is None else Image.open(image) for image in images]
    encoded = processor.batch_encode([QUESTIONS["hugging_face"]] * len(images), pictures)
    ids = model.generate(**processor.collate(encoded), do_sample=False, max_new_tokens=1024)
    answers: list[str] = processor.batch_decode(ids)
    return answers


def main(folder: Path) -> None:
    """Write all answers, by the name of the image; "text" is the question without an image."""
    images: dict[str, Path | None] = {file.stem: file for file in sorted((folder / "images").glob("*.png"))}
    images["text"] = None
    stock = Stock(folder)
    answers: dict[str, Any] = {
        "hugging_face": {name: hugging_face(folder, image) for name, image in images.items()},
        "local_checkpoint": {name: local_checkpoint(folder, image) for name, image in images.items()},
        "stock": {
            snippet: {name: stock.answer(question, image) for name, image in images.items()}
            for snippet, question in QUESTIONS.items()
        },
        "batch": dict(zip(images, batch(folder, list(images.values())), strict=True)),
    }
    import transformers

    answers["transformers"] = transformers.__version__
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # a download is an error
    os.environ["HF_MODULES_CACHE"] = str(Path(sys.argv[1]) / "modules")  # where transformers copies an export's code
    main(Path(sys.argv[1]))
