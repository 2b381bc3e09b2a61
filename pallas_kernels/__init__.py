"""GPU kernels in Pallas, one file per operation. Imports jax only, never jaxfw.

No operation has needed a kernel yet: attention over a prompt is left to cuDNN, norms and gated units to XLA,
which are at the hardware's limit there.
"""
