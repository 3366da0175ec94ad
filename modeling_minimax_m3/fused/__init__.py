"""Fused operators of layers and the loss: one kernel in place of several, where the compiled extension takes the call.

Each module holds one operator or a few: the definition in plain PyTorch (`..._reference`), the call of the kernel, and
its gradient. Where the kernels do not run, the definition does. The operators for few tokens have no gradient, and what
they replace are calls of the layers' own modules.
"""
