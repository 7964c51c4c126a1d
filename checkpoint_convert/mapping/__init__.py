"""Which Hugging Face tensors and settings correspond to which Megatron ones: names, transforms and model families.

Nothing here opens a file: tensors come in as mappings, configs as dictionaries.
"""
