"""Kernels for stages in which a profile shows that XLA leaves time on the table. There are none yet."""
