"""Continuing prompts token by token. Imports quant, models.blocks and models.attention."""
