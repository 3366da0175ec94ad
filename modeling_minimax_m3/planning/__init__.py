"""What `memory_plan` computes with: weights, passes, devices, and changes of a request."""
