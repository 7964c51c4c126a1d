"""The published interface of Instella-VL, and the code that every `instellavl` export contains.

The modules `*_instellavl`, `constants`, `conversation` and `mm_utils` are copied into an export unchanged; they import
only each other, transformers, torch, numpy and Pillow. `model.builder` and `utils` are for local scripts. Nothing here
may import megatron-core or megatron_vlm.
"""
