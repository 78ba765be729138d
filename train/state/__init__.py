"""What a run leaves in its folder to go on from: checkpoints, what they must agree with, and the folder itself.

Imports train.config, parallel, models and quant.
"""
