"""Write a page that shows what is in the data: plots per data set, the packing, examples, suspicious samples."""

import sys

from megatron_vlm.commands.data_report import main

if __name__ == "__main__":
    sys.exit(main())
