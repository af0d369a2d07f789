"""OCP e4m3 numbers in integer arithmetic, the same bits on every GPU, whether or not it computes in the type.

    byte  s eeee mmm      value (-1)^s 2^(e - 7) (1 + m / 8), or 2^-6 m / 8 where e = 0; at most 448
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["from_e4m3", "to_e4m3"]


@triton.jit
def to_e4m3(x):
    """float32 -> uint8, rounded to nearest, ties to even, clipped at 448. NaN becomes NaN (0x7f)."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = bits & 0x7FFFFFFF
    clipped = tl.where(size > 0x43E00000, 0x43E00000, size).to(tl.uint32)  # 448
    odd = (clipped >> 20) & 1
    normal = ((clipped + 0x7FFFF + odd) >> 20) - 960  # 960: (127 - 7) << 3, the difference of the exponents' biases
    # Adding 2^14 leaves multiples of 2^-9, the spacing of subnormal numbers, in the low bits, rounded to even.
    shifted = clipped.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(clipped < 0x3C800000, subnormal, normal)  # 2^-6
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return (code | sign).to(tl.uint8)


@triton.jit
def from_e4m3(byte, IS_NATIVE: tl.constexpr):
    """uint8 -> float16, exact: shifted into place, the number is 2^-8 of its value, subnormal numbers included.

    IS_NATIVE: the GPU's own instruction, from sm_89 on; the same numbers in a quarter of the instructions.
    """
    if IS_NATIVE:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = byte.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return half.to(tl.float16, bitcast=True) * 256.0
