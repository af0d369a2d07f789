// Every kernel, built once per instruction set inside its namespace, and the table that names them.
#pragma once

// What most ops share: one phase, no scratch memory.
struct SimpleOp {
    static int phases(const Call&, int) { return 1; }
    static int64_t scratch(const Call&, int) { return 0; }
};

#include "kernels/math.h"
#include "kernels/pointwise.h"
#include "kernels/norm.h"
#include "kernels/pages.h"
#include "kernels/panels.h"
#include "kernels/linear_float.h"
#include "kernels/blocks.h"
#include "kernels/linear_blocks.h"
#include "kernels/linear_i8.h"
#include "kernels/linear.h"
#include "kernels/embedding.h"
#include "kernels/kv.h"
#include "kernels/attention_kinds.h"
#include "kernels/attention_int8.h"
#include "kernels/attention.h"
#include "kernels/rows.h"
#include "kernels/sample.h"

struct mark_op : SimpleOp {
    static void run(const Call&, int, int, int) {}
};

static const Op kOps[] = {
#define PG_ROW(name, tensors, domain) \
    {#name, tensors, domain, checks::name, name##_op::phases, name##_op::scratch, name##_op::run},
    PG_OPS(PG_ROW)
#undef PG_ROW
};
