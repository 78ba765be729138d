"""Parts of layers that any kind of attention goes with: linear layers with LoRA, norms, routers, experts, balance.

Imports quant.
"""
