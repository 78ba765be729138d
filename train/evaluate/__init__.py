"""Judging a model by rows that it hasn't learnt: `python -m train.evaluate`, and lm-eval's tasks on its models."""
