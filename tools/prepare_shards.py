"""Write MDS shards from LLaVA-style annotations and image files, to a folder or an S3 store."""

import sys

from megatron_vlm.commands.prepare_shards import main

if __name__ == "__main__":
    sys.exit(main())
