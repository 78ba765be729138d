"""Kernels of what models compute besides products: each file has one subject, a kernel's torch form beside it."""
