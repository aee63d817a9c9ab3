"""The `vllm` engine: a vLLM server, or a vLLM within this process, as a consumer sees it.

What runs in vLLM's workers: `plugin`, `backend`, `extension`, `worker` and the host of their model.
What runs in the consumer, which may have no vLLM: `control`, `http`, `handle`, `engine`.
"""
