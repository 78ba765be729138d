"""Adapters in the form that a server reads: `python -m models.export ADAPTER OUT --for vllm`."""
