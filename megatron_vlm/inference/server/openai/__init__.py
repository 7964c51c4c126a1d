"""OpenAI's protocol: requests, chat and text completions, and the server-sent events of their answers.

What other protocols need as well stays in `inference.server`.
"""
