"""Text generation from a Megatron checkpoint.

Exported Hugging Face models do not need this package: they run in `transformers`, or in `instellavl`.
"""
