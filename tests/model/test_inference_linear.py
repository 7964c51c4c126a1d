"""Linear layers without gradients compute what megatron-core's do with them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.config import ParallelConfig
from megatron_vlm.model.layers.inference_linear import (
    InferenceColumnParallelLinear,
    InferenceRowParallelLinear,
    product,
)
from megatron_vlm.runtime.launch import distributed


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with distributed(ParallelConfig()):
        yield


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 16, 31, 32, 33, 40])
@pytest.mark.parametrize("shape", [(96, 32), (64, 176), (512, 2048)])
def test_product(rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 1, shape[1], dtype=torch.float64), torch.randn(*shape, dtype=torch.float64)
    result = product(x, weight)
    assert result.shape == (rows, 1, shape[0])
    torch.testing.assert_close(result, x @ weight.t())


@pytest.mark.parametrize("shape", [(512, 512), (512, 2048), (6144, 2048)])
def test_a_row_does_not_depend_on_the_others(shape: tuple[int, int]) -> None:
    """Bit for bit with MKL, for the numbers of rows that steps in decode have. F.linear gives other bits for 8 rows."""
    torch.manual_seed(0)
    x, weight = torch.randn(32, shape[1]), torch.randn(*shape)
    expected = product(x, weight)[:8]
    for rows in (8, 16, 24):
        result = product(x[:rows], weight)[:8]
        torch.testing.assert_close(result, expected)
        assert torch.equal(result, expected) or not torch.backends.mkl.is_available()


def test_the_factors_are_exchanged_for_few_rows() -> None:
    """The order in memory shows it."""
    weight = torch.randn(24, 16)
    for rows, exchanged in ((1, False), (2, True), (32, True), (33, False)):
        assert product(torch.randn(rows, 1, 16), weight).is_contiguous() != exchanged


@pytest.mark.parametrize("skip_bias_add", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layer_class", [InferenceColumnParallelLinear, InferenceRowParallelLinear])
def test_layers(layer_class: type, bias: bool, skip_bias_add: bool) -> None:
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, use_cpu_initialization=True)
    where = {"gather_output": False} if layer_class is InferenceColumnParallelLinear else {"input_is_parallel": True}
    layer = layer_class(
        32, 48, config=config, init_method=torch.nn.init.normal_, bias=bias, skip_bias_add=skip_bias_add, **where
    )
    if bias:
        torch.nn.init.normal_(layer.bias)
    x = torch.randn(9, 1, 32)
    expected, expected_bias = layer(x)
    with torch.no_grad():
        output, output_bias = layer(x)
    torch.testing.assert_close(output, expected)
    assert output_bias is expected_bias and (output_bias is None) == (not bias or not skip_bias_add)
