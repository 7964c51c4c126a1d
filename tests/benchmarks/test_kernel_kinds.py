"""Kernels of the profiles that were taken are of the right kind."""

from __future__ import annotations

import pytest

from benchmarks.support.kernel_kinds import kind_of

KERNELS = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNN": "matrix products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "matrix products",
    "Cijk_Ailk_Bljk_BBS_BH_MT256x256x64_MI16x16x1": "matrix products",
    "void cutlass::device_kernel<flash::FlashAttnFwdSm90<...>>": "attention",
    "void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<128, ...>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3": "attention",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer",
    "triton_poi_fused__to_copy_mul_silu_0": "compiled elementwise",
    "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL": "communication",
    "Memcpy HtoD (Pinned -> Device)": "copies",
    "void at::native::vectorized_layer_norm_kernel<c10::BFloat16, float>": "norms",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>": "other",
}


@pytest.mark.parametrize(("kernel", "kind"), KERNELS.items())
def test_kind(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind
