"""The demo of `make demo`: small models, generated text, and what came of it. Its commands: `python -m train.demo`.

Imports models and train.output.report.
"""
