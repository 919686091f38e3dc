"""Trained weights on disk: checkpoints and low-rank adapters."""
