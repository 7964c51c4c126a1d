"""An HTTP server for the generation engine: Megatron-LM's protocol, OpenAI's, and a chat page.

    process.py    the process: socket, engine, signals, exit code
    app.py        the application: routes, errors
    openai/       OpenAI's protocol; megatron_api.py Megatron-LM's; page.py the chat page
    ...           what they share

This package needs fastapi and uvicorn: pip install 'megatron-vlm[serve]'.
"""
