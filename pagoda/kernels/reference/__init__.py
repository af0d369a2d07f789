"""The definition of every op, written for reading, on the array API standard: numpy arrays and torch tensors alike.

Importing the package registers all of them for the device "reference".
"""

from pagoda.kernels.reference import attention, elementwise, linear, logits, sample

__all__ = ["attention", "elementwise", "linear", "logits", "sample"]
