"""Files that hold samples with their images: Parquet, Arrow and WebDataset tars.

Modules here read one file each. `open_source`, above them, decides which one reads what.
"""
