"""Devices, process groups, launch and logging. Import this before anything of `megatron.core`."""

from megatron_vlm.runtime.megatron_cpu import install

install()
