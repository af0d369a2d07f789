"""The native kernels: the shared library bound through ctypes, and the ops that run on it or are recorded for it."""
