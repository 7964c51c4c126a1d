"""A text-generation server: the same as megatron-vlm serve."""

import sys

from megatron_vlm.text_generation.serve import main

if __name__ == "__main__":
    sys.exit(main())
