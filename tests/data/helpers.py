"""Small data sets for the tests."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from megatron_vlm.config.data import DataConfig
from megatron_vlm.config.model import LanguageConfig, ModelConfig, VisionConfig
from megatron_vlm.config.training import TrainingConfig
from megatron_vlm.data.rows.rank_batch import RankView

EOS, PAD = "|||IP_ADDRESS|||", "<|padding|>"


def tiny_model() -> ModelConfig:
    """Tiles of 8 pixels with 4 patches."""
    return ModelConfig(
        vision=VisionConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2, image_size=8, patch_size=4),
        language=LanguageConfig(vocab_size=512),
        image_token_index=500,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16], [24, 8]],
    )


def view_of(model: ModelConfig, **changes: Any) -> RankView:
    """The view of a single process, with changes."""
    alone = RankView(
        is_first_stage=True, is_last_stage=True, context=(0, 1), sequence=(0, 1), tile_ranks=1, tower_sequence_ranks=1,
        tokens_per_tile=model.vision.tokens_per_tile, patches_per_tile=model.vision.patches_per_tile,
        groups_documents=True, groups_tiles=True, loss_normalization="token",
    )  # fmt: skip
    return replace(alone, **changes)


def tiny_tokenizer_folder(folder: Path) -> Path:
    """A byte-level BPE with the real one's special tokens, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What colour is the shape? <|user|> <|assistant|> red circle"] * 4, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOS, "pad_token": {"content": PAD}}))
    return folder


def tiny_sentencepiece(file: Path) -> Path:
    """A sentencepiece model trained on the spot; bytes it has not seen are spelled out."""
    import sentencepiece

    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["What colour is the shape?", "The circle is red.", "The square is blue."] * 9),
            model_writer=stream,
            vocab_size=320,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return file


def image_bytes(width: int, height: int, seed: int = 0, kind: str = "PNG", **save: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **save)
    return stream.getvalue()


def conversation(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@dataclass
class Folder:
    """Annotations and images that a test writes."""

    root: Path
    entries: list[Any] = field(default_factory=list)

    @property
    def images(self) -> Path:
        (self.root / "images").mkdir(parents=True, exist_ok=True)
        return self.root / "images"

    def image(self, name: str, width: int, height: int, **kwargs: Any) -> str:
        (self.images / name).write_bytes(image_bytes(width, height, **kwargs))
        return name

    def add(self, sample_id: str, *texts: str, **more: Any) -> None:
        self.entries.append({"id": sample_id, "conversations": conversation(*texts), **more})

    def write(self, name: str = "train.json") -> Path:
        path = self.root / name
        lines = [json.dumps(entry) for entry in self.entries]
        path.write_text("\n".join(lines) if name.endswith(("jsonl", "ndjson")) else f"[{','.join(lines)}]")
        return path


def mixed_folder(root: Path, samples: int = 40, seed: int = 0) -> Folder:
    """Images of several sizes, two-image samples, text-only samples, one to three turns."""
    rng = np.random.default_rng(seed)
    folder = Folder(root)
    for i in range(samples):
        images = [
            folder.image(f"{i}_{k}.png", int(rng.integers(4, 30)), int(rng.integers(4, 30)), seed=i)
            for k in range((1, 1, 2, 0)[i % 4])
        ]
        texts = ["<image>\n" * len(images) + f"What is {i}? " + "word " * int(rng.integers(0, 10)), f"It is {i}."]
        for turn in range(i % 3):
            texts += [f"And {turn}?", f"{turn} too."]
        image: dict[str, Any] = {"image": images if len(images) > 1 else images[0]} if images else {}
        folder.add(f"s{i}", *texts, **image)
    return folder


def make_recipe(data_path: Path | list[str], image_folder: Path | None, tokenizer: Path, **settings: Any) -> Any:
    """A recipe with the settings that the loader reads; `seed` and `global_batch_size` go to training, the rest to
    data.
    """
    training = {key: settings.pop(key) for key in ("seed", "global_batch_size") if key in settings}
    data = {"seq_length": 192, "max_tiles_per_row": 16, "num_workers": 0, **settings}
    paths = [str(data_path)] if isinstance(data_path, Path) else data_path
    return SimpleNamespace(
        model=tiny_model(),
        data=DataConfig(
            data_path=paths,
            image_folder=str(image_folder) if image_folder else None,
            tokenizer_model=str(tokenizer),
            **data,
        ),
        training=TrainingConfig(**{"global_batch_size": 4, "seed": 7, **training}),
    )
