"""Modules that a decoder layer is made of: attention with its variants, indexer, experts, normalization, rotary embedding."""
