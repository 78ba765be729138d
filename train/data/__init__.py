"""From files of rows to the batches of a run: reading, chat templates, tokenising, packing.

Imports train.config, train.loss, models.blocks, parallel and quant.common.
"""
