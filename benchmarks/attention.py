"""Every attention backend of this machine at the shapes of a model: the numbers that `attention_backend: auto` needs.

    python -m benchmarks.attention                   # Instella-VL-1B: a row of the instruction mix, one document, tiles
    python -m benchmarks.attention --config RECIPE.yaml --repeats 3

FLOPs are those of the scores that the mask leaves: forward 4 h d per pair of tokens, backward 2.5 times that. Before
timing, the output of each backend is compared with sdpa's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import megatron_vlm.runtime.megatron_patches  # noqa: F401  (must run before megatron.core is imported)
from benchmarks.support.instruct_samples import InstructRows
from benchmarks.support.report import RESULTS, machine, save, table
from benchmarks.train_step import time_call
from megatron_vlm.config import Recipe
from megatron_vlm.config.recipe import load_recipe
from megatron_vlm.data.rows.document_layout import document_layout
from megatron_vlm.model.layers.attention_backend import PREFERRED, Attention, why_not
from megatron_vlm.model.layers.packed_sequence import PackedSequence, packed_sequence
from megatron_vlm.runtime.device import current_device, device_kind

CONFIG = Path(__file__).parent.parent / "examples/instellavl/instruct.yaml"
TOLERANCE = {True: 2e-2, False: 1e-5}
"""Relative difference of the output's norm allowed between a backend and sdpa, by bf16."""


@dataclass
class Shape:
    """An attention call of the model."""

    name: str
    cu_seqlens: list[int]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool

    @property
    def flops(self) -> float:
        """Forward and backward."""
        lengths = [end - start for start, end in itertools.pairwise(self.cu_seqlens)]
        pairs = sum(length * (length + 1) / 2 if self.causal else length**2 for length in lengths)
        return 3.5 * 4 * self.heads * self.head_dim * pairs


def shapes_of(recipe: Recipe) -> list[Shape]:
    """A row of the instruction mix and one long document in the language model; the row's tiles in the tower."""
    language, vision, seq_length = recipe.model.language, recipe.model.vision, recipe.data.seq_length
    source = InstructRows(recipe.model, seq_length, recipe.data.max_tiles_per_row)
    row = source.pack(source.samples(0))
    heads = language.num_attention_heads, language.num_key_value_heads, language.head_width
    tower = vision.num_attention_heads, vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    tiles = [vision.tokens_per_tile * tile for tile in range(max(1, row.num_tiles) + 1)]
    return [
        Shape(f"language, {len(row.cu_seqlens) - 1} documents", row.cu_seqlens, *heads, causal=True),
        Shape("language, one document", [0, seq_length], *heads, causal=True),
        Shape(f"vision, {len(tiles) - 1} tiles", tiles, *tower, causal=False),
    ]


@dataclass
class Measured:
    """One backend at one shape."""

    shape: str
    backend: str
    seconds: float
    """Forward and backward, the median."""
    flops_per_second: float
    difference: float
    """Of the output from sdpa's, relative to its norm."""


def measure(shape: Shape, dtype: torch.dtype, repeats: int, failed: list[str]) -> list[Measured]:
    """All backends that work here; raises SystemExit if one computes something else than sdpa.

    One that ends with an error is added to `failed`, and the others are measured all the same.
    """
    device = current_device()
    generator = torch.Generator(device).manual_seed(0)
    tokens = shape.cu_seqlens[-1]
    q, k, v, upstream = (
        torch.randn(tokens, heads, shape.head_dim, device=device, generator=generator).to(dtype)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    )
    inputs = [x.requires_grad_() for x in (q, k, v)]
    packed = packed_sequence(document_layout(shape.cu_seqlens, causal=shape.causal, grouped=True).to(device))
    results, reference = [], Attention("sdpa", "").kernel(q, k, v, packed).detach().float()
    for backend in PREFERRED[device_kind()]:
        if (problem := why_not(backend, dtype, shape.head_dim)) is not None:
            print(f"{shape.name}: {backend} {problem}", flush=True)
            continue
        attention = Attention(backend, "")

        def forward_and_backward(attention: Attention = attention) -> torch.Tensor:
            return _forward_and_backward(attention, inputs, packed, upstream)

        try:
            output = forward_and_backward()
        except RuntimeError as error:
            failed.append(f"{shape.name}: {backend} failed: {error}")
            continue
        difference = float((output.float() - reference).norm() / reference.norm())
        if not difference <= TOLERANCE[dtype == torch.bfloat16]:
            raise SystemExit(f"{shape.name}: {backend} differs from sdpa by {difference:.1e}")
        times = [time_call(forward_and_backward) for _ in range(repeats + 2)][2:]
        seconds = statistics.median(times)
        results.append(Measured(shape.name, backend, seconds, shape.flops / seconds, difference))
    return results


def _forward_and_backward(
    attention: Attention, inputs: list[torch.Tensor], packed: PackedSequence, upstream: torch.Tensor
) -> torch.Tensor:
    query, key, value = inputs
    out = attention.kernel(query, key, value, packed)
    torch.autograd.grad(out, inputs, upstream)
    return out.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipe that gives the model and the row length")
    parser.add_argument("--repeats", type=int, default=12, help="timed calls; the median is reported")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.config)
    dtype = torch.bfloat16 if recipe.training.bf16 else torch.float32
    failed: list[str] = []
    results = [result for shape in shapes_of(recipe) for result in measure(shape, dtype, arguments.repeats, failed)]
    about = machine()
    print(f"\n{about['device']}, torch {about['torch']}; forward and backward, median of {arguments.repeats}\n")
    lines = [
        [r.shape, r.backend, f"{1000 * r.seconds:.2f}", f"{r.flops_per_second / 1e12:.3g}", f"{r.difference:.1e}"]
        for r in results
    ]
    print(table(["shape", "backend", "ms", "TFLOP/s", "difference from sdpa"], lines))
    name = f"attention-{about['device'].lower().replace(' ', '-')}"
    path = save(arguments.output, name, {"repeats": arguments.repeats, "backends": [asdict(r) for r in results]})
    print(f"written to {path}")
    if failed:
        raise SystemExit("\n".join(failed))


if __name__ == "__main__":
    main()
