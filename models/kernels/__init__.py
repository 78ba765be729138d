"""Triton kernels of the models, each beside its torch form; quant/kernels says how they are chosen and launched."""
