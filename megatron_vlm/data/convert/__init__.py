"""Other people's data sets to LLaVA annotations: rows in, entries and image files out."""
