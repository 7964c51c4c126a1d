"""Copy a finished set of shards to an S3 store: each object verified, what is there already not sent again."""

import sys

from megatron_vlm.commands.upload_shards import main

if __name__ == "__main__":
    sys.exit(main())
