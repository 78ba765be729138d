"""What mixes the tokens of a document: softmax attention in its variants, sparse attention, linear attention.

Imports quant and models.blocks.
"""
