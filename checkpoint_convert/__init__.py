"""Conversion between Hugging Face and Megatron: the commands hf_to_megatron, megatron_to_hf, merge and verify.

Imports go one way: the commands use `huggingface` and `megatron`, which read and write folders, and both use `mapping`.
Training code does not belong here.
"""
