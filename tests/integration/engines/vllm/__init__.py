"""The `vllm` engine beside a server that stands in for vLLM's; its workers really move bytes."""
