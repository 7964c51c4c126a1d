"""Hugging Face <-> Megatron: one name map for both directions, and the folders on either side."""
