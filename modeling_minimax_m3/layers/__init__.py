"""Parts of a decoder layer: attention and its kinds, indexer, experts, normalization, rotary embedding."""
