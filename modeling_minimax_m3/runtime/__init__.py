"""State and layout of a call: the cache, where sequences lie in a batch, and how releases of Transformers differ."""
