"""Constants of prompts, labels and pixels."""

from __future__ import annotations

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""
IMAGE_TOKEN_INDEX = -200
"""Placeholder of an image in the ids of a prompt; the model inserts the image's features there."""
DEFAULT_IMAGE_TOKEN = "<image>"
"""Placeholder of an image in the text of a prompt."""
END_OF_TURN = "|||IP_ADDRESS|||"
"""Token 50279 of OLMo's tokenizer; in this model it starts a conversation and ends every answer."""
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's image mean and std of red, green and blue, between 0 and 1."""
