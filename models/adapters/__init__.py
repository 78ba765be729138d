"""LoRA on a model: which matrices, attaching it, and PEFT's files.

Imports quant, models.blocks and models.checkpoint.
"""
