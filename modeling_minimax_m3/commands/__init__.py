"""The subcommands of `minimax-m3`, one module each with `main(argv)`. They may import everything; nothing imports them."""

import warnings

# PEFT 0.21 reads this name of Transformers. Users can do nothing about it.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
