"""A training run: configuration, data, loss, optimiser, loop and outputs. Start one with `python -m train`."""
