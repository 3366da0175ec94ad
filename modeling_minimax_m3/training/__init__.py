"""The language modeling loss, computed in chunks."""
