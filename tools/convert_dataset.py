"""Make LLaVA annotations and image files of somebody else's data set."""

import sys

from megatron_vlm.commands.convert_dataset import main

if __name__ == "__main__":
    sys.exit(main())
