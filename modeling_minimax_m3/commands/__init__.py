"""The subcommands of `minimax-m3`, one module each with `main(argv)`. They may import everything; nothing imports them."""
