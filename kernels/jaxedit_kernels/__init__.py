"""Kernels for single stages of jaxedit, each a folder; see kernels/README.md. Depends on jax alone."""
