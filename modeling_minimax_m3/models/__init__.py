"""The models that users load, their outputs, and what `generate` needs of them."""
