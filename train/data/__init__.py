"""From rows to the batches of a run: chat templates, tokenising, packing.

Imports train.config, train.rows, models.blocks, parallel and quant.common.
"""

IGNORED = -100  # the label of a position without loss, which torch.nn.functional.cross_entropy ignores too
