"""Kernels for CUDA, written in Triton, each beside what it computes in torch's own operations.

`language` imports Triton where it can be used and launches; `choice` says which kernels a process uses; every other
file has one kernel. What models compute with kernels of their own is in models/kernels.
"""
