"""Make the folders that the published mixes expect, and say where each data set comes from."""

import sys

from megatron_vlm.commands.make_data_folders import main

if __name__ == "__main__":
    sys.exit(main())
