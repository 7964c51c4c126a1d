"""What an estimate needs to know of a GPU and its links."""

from __future__ import annotations

from dataclasses import dataclass

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One GPU, in a machine of eight."""

    name: str
    memory: float
    """Bytes."""
    peak: float
    """Dense bf16 operations per second, from the datasheet."""
    gemm: float
    """The same for large matrix products, as measured or published; elsewhere a share of the datasheet's."""
    bandwidth: float
    """Bytes per second of its memory."""
    link: float
    """Bytes per second that it sends to the GPUs of its machine, in one direction."""
    network: float = 50 * GB
    """Bytes per second to other machines: one port of 400 Gbit/s."""


DEVICES = {
    device.name: device
    for device in (
        # GEMM of H100 and H200: docs/benchmarks.md. Of MI300X: 724 to 765 of AMD's preflight on accepted nodes.
        Device("A100", 80 * GB, 312 * TERA, 260 * TERA, 2.0e12, 300 * GB, 25 * GB),
        Device("H100", 80 * GB, 989 * TERA, 732 * TERA, 3.35e12, 450 * GB),
        Device("H200", 141 * GB, 989 * TERA, 790 * TERA, 4.8e12, 450 * GB),
        Device("B200", 180 * GB, 2250 * TERA, 1800 * TERA, 8.0e12, 900 * GB),
        Device("MI300X", 192 * GB, 1307 * TERA, 740 * TERA, 5.3e12, 448 * GB),
        Device("MI325X", 256 * GB, 1307 * TERA, 740 * TERA, 6.0e12, 448 * GB),
        Device("MI355X", 288 * GB, 2500 * TERA, 1400 * TERA, 8.0e12, 538 * GB),
    )
}
GPUS_PER_MACHINE = 8
SHARE_OF_GEMM = 0.57
"""Of the rate of a large matrix product, what a whole step reaches: benchmarks/real_size.py measured it on an H200."""
USABLE_MEMORY = 0.92
"""The rest is for the driver, communication buffers and fragmentation."""
