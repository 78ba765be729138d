"""New tokens after a prompt: which token follows, and the loop that asks the model for one after another.

Imports models.attention and models.blocks.
"""
