"""Checkpoints on disk, in the hub's format and in nibble's own: names, reading, converting, exporting.

Imports quant, models.blocks and the architectures through models.registry.
"""
