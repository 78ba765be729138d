"""The config of a run: its keys, what may be combined, YAML in and out, and what is said when it is wrong.

Imports quant.common.
"""
