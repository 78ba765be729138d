"""What layers are made of whatever mixes their tokens: linear layers with LoRA, norms, routers, experts, balance.

Imports quant.
"""
