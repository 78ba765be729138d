"""Kernels for CUDA of what models compute element by element, each beside its torch form (quant/kernels)."""
