"""Threads of the BLAS library that JAX's LAPACK calls run in, on a CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import cache

import jax.scipy.linalg  # noqa: F401  (loads the library)
from threadpoolctl import ThreadpoolController

_SMALL = 2048


def quiet_blas(n: int) -> AbstractContextManager:
    """One BLAS thread, for programs in which decompositions of n × n matrices are a small part.

    OpenBLAS's threads wait for more work by spinning, for tens of milliseconds. Between two products of XLA's they
    take its cores away, which costs more than they save while n is small. What is started under this context has to
    be waited for under it.
    """
    return _controller().limit(limits=1 if n <= _SMALL else None, user_api="blas")


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()
