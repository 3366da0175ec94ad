"""Speed and memory of this project beside its baselines: see README.md."""
