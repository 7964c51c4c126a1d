"""From annotations and images to packed rows: nothing here needs megatron-core or a GPU."""
