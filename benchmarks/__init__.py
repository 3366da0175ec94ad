"""Times and memory of this project beside stock Transformers: `python -m benchmarks`, see README.md."""
