"""Print one sample as the model will see it: ids, labels, positions, tiles."""

import sys

from megatron_vlm.commands.show_sample import main

if __name__ == "__main__":
    sys.exit(main())
