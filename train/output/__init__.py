"""What a run shows: lines on the terminal, the log, metrics, plots, and the tables before and after it.

Imports train.config, parallel, models and quant.
"""
