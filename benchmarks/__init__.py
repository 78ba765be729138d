"""Measurements: a training step on CPU beside the peer (`benchmarks.step`), CUDA at full size (`benchmarks.gpu`)."""
