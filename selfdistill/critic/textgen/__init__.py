"""Text in, text out: frozen models that answer prompts greedily, wherever they run.

interface.py   TextGenerator, Generation
build.py       the configured one
local.py       a model of this process (transformers or vLLM)
server.py      a model behind an OpenAI-compatible server
cache.py       answers kept on disk
"""
