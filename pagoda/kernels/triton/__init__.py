"""The ops on a GPU, in Triton, one file each. Importing the package registers them for the device "cuda".

Operands are torch tensors; activations have the model's type (bfloat16 or float16), arithmetic is float32. Weights and
cache planes have layouts of their own (`weight`, `plane`). `prepare` makes a step's inputs on the device. Formulas and shapes are in `pagoda.kernels.ops`.
"""

from pagoda.kernels.triton import (
    activation,
    attention,
    embedding,
    kv_write,
    linear,
    logits,
    norm,
    one_row,
    pointwise,
    prepare,
    rope,
    sample,
)

__all__ = ["activation", "attention", "embedding", "kv_write", "linear", "logits", "norm", "one_row", "pointwise", "prepare", "rope", "sample"]
