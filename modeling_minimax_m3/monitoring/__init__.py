"""What a training run shows of itself. `run_monitor` is its public side."""
