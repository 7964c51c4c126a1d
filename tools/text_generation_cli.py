"""Talk to a text-generation server in a terminal: the same as megatron-vlm chat."""

import sys

from megatron_vlm.commands.chat_client import main

if __name__ == "__main__":
    sys.exit(main())
