"""Sampling in C++ on the CPU, compiled on first use, for the models that it takes.

`build` compiles and loads the source, `backend` refuses models or runs them.
"""

from starflow2.inference.native.backend import NativeBackend, native_backend
from starflow2.inference.native.build import Unavailable

__all__ = ["NativeBackend", "Unavailable", "native_backend"]
