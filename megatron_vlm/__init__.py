"""megatron-vlm: packed vision-language training on megatron-core, every layout shown equal to one process."""

from importlib.util import find_spec

__version__ = "0.1.0"

_NEEDED = {"megatron": "megatron-core", "psutil": "psutil", "yaml": "pyyaml"}
"""Module -> package, of those in the extra `train` that nothing here works without."""

if _missing := [package for module, package in _NEEDED.items() if find_spec(module) is None]:
    raise ImportError(
        f"megatron_vlm trains and converts with {', '.join(_missing)}, not installed here. From the root of the "
        "project: pip install '.[train]'. Exported models and the package instellavl work without"
    )
