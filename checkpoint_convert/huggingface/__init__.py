"""Hugging Face folders, read and written: weights, configs, tokenizers, model card; one module per model format.

Nothing here knows Megatron checkpoints; `mapping` translates the tensor names.
"""
