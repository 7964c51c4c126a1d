"""What the transformer layers of the vision tower and the language model are made of: attention, linears, norms.

The model parts that are built from these layers stay in `model`.
"""
