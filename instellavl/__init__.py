"""The published interface of Instella-VL, over the code that travels inside every `instellavl` export.

The modules named `*_instellavl`, `constants`, `conversation` and `mm_utils` are copied into an export as they are, and
import nothing but each other, transformers, torch, numpy and Pillow. `model.builder` and `utils` serve local scripts.
Nothing here needs megatron-core.
"""
