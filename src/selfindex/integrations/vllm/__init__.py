"""The cache inside vLLM: an attention backend whose pages live in the engine's memory."""
