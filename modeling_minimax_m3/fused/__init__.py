"""Fused operators of layers and the loss: one kernel in place of several, where the compiled extension takes the call.

Each module holds one operator: its definition in plain PyTorch (`..._reference`), which also runs wherever the kernels
do not, and the call of the kernel with its gradient.
"""
