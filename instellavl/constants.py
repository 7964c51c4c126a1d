"""Numbers and strings that prompts, labels and pixels are made of."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a position that no loss is taken at."""
IMAGE_TOKEN_INDEX = -200
"""What stands for an image among the ids of a prompt; the model puts the image's features there."""
DEFAULT_IMAGE_TOKEN = "<image>"
"""What stands for an image in the text of a prompt."""
END_OF_TURN = "|||IP_ADDRESS|||"
"""The string of id 50279, which opens a conversation and ends every answer; OLMo's tokenizer happens to call it so."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of colours between 0 and 1: red, green, blue."""
