"""Checkpoints on disk: synthetic ones, and conversion between layouts and precisions without loading a model."""
