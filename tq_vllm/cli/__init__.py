"""Commands of tq_vllm: the set-up, the default model, the demo server, and the `tq-vllm` tool."""
