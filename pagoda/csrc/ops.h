// The one table of ops: name, number of operands, the operand whose rows are the op's domain. The order is the opcode.
#pragma once

#define PG_OPS(X)            \
    X(embedding, 3, 2)       \
    X(rms_norm, 3, 2)        \
    X(linear, 10, 4)         \
    X(rope, 4, 3)            \
    X(kv_write, 5, 0)        \
    X(attention, 12, 6)      \
    X(act_and_mul, 2, 1)     \
    X(add, 3, 2)             \
    X(scale, 2, 1)           \
    X(soft_cap, 2, 1)        \
    X(gather_rows, 3, 2)     \
    X(row_logsumexp, 2, 1)   \
    X(row_is_finite, 2, 1)   \
    X(sample, 8, 7)          \
    X(sample_masked, 10, 9)  \
    X(mark, 0, -1)
