"""List the parallel layouts of a recipe that fit on some GPUs, fastest first."""

import sys

from megatron_vlm.commands.plan_layout import main

if __name__ == "__main__":
    sys.exit(main())
