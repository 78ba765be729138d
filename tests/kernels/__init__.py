"""Tests of the Triton kernels under Triton's interpreter; tests/test_interpreted.py runs them."""
