"""The data tools. Each module is one command with `main(argv) -> int`, called by `tools/` and by the CLI.

Commands parse flags, call `megatron_vlm.data` and print. They must not import megatron-core, directly or indirectly.
"""
