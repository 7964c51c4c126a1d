"""benchmarks.serving as on a GPU whose attention kernel reads the paged cache. Takes the benchmark's arguments."""

from __future__ import annotations

from benchmarks import serving
from megatron_vlm.inference import model_runner
from tests.inference.paged_reference import PAGED, RecordedOperations


def main() -> None:
    model_runner.paged_kernel = lambda *_: PAGED
    model_runner.CudaGraphs = RecordedOperations  # type: ignore[assignment,misc]
    serving.main()


if __name__ == "__main__":
    main()
