"""Devices, process groups, launch and logging. Import this before anything of `megatron.core`."""

import warnings

from megatron_vlm.runtime.megatron_cpu import install

# megatron-core tells its own developers of its own deprecations, some from every layer of every rank.
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core")
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# torch renames collectives that megatron-core still calls by their old names.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

install()
