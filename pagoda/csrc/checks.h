// Cheap checks of an op's operands, the same for every instruction set: nullptr when right, else what is wrong.
#pragma once
#include "call.h"

namespace pg::checks {

static inline bool activations(const pg_tensor& t) { return t.data && t.dtype == PG_F32 && t.stride >= t.cols && t.cols > 0; }
static inline bool index(const pg_tensor& t) { return t.data && (t.dtype == PG_I32 || t.dtype == PG_I64); }
static inline bool blocks(const pg_tensor& t) { return (t.dtype & ~PG_W_INT8) >= PG_W_Q8_0 && (t.dtype & ~PG_W_INT8) <= PG_W_Q6_K; }
static inline bool packed(const pg_tensor& t) { return t.data && t.rows > 0 && (blocks(t) || t.dtype == PG_W_F32 || t.dtype == PG_W_BF16 || t.dtype == PG_W_I8); }
static inline bool blocks_fit(const pg_tensor& w) {
    if (w.dtype == PG_W_I8) return w.cols % 16 == 0;
    return !blocks(w) || w.cols % ((w.dtype & ~PG_W_INT8) >= PG_W_Q4_K ? 256 : 32) == 0;
}
static inline bool same_cols(const pg_tensor& a, const pg_tensor& b) { return a.cols == b.cols; }

static inline const char* embedding(const Call& c) {
    if (!index(c.t[0])) return "embedding: ids must be int32 or int64";
    if (!packed(c.t[1]) || !blocks_fit(c.t[1])) return "embedding: the table is not a packed weight";
    if (!activations(c.t[2]) || !same_cols(c.t[2], c.t[1])) return "embedding: out must be float32, as wide as the table";
    return nullptr;
}
static inline const char* rms_norm(const Call& c) {
    if (!activations(c.t[0]) || !activations(c.t[2]) || !same_cols(c.t[0], c.t[2])) return "rms_norm: x and out must be float32 of one width";
    if (!c.t[1].data || c.t[1].dtype != PG_F32 || c.t[1].rows < 1) return "rms_norm: weight must be float32";
    return c.t[0].cols % c.t[1].rows ? "rms_norm: the weight's length must divide the width" : nullptr;
}
static inline const char* cache(const pg_tensor& k, const pg_tensor& v, const int64_t* i) {
    if (!k.data || !v.data || k.dtype != v.dtype || (k.dtype != PG_F32 && k.dtype != PG_BF16 && k.dtype != PG_U8)) return "the cache must be float32, bfloat16 or bytes";
    if (i[0] < 16 || i[0] % 16 || i[1] < 1 || i[2] < 2 || i[2] % 2 || i[2] > 512 || i[3] < 1) return "the cache's sizes are out of range";
    if (k.dtype == PG_U8 && i[2] % 4) return "a cache of bytes needs heads of a multiple of 4";
    return nullptr;
}
static inline const char* linear(const Call& c) {
    const pg_tensor *x = &c.t[0], *w = &c.t[1], *bias = &c.t[2], *residual = &c.t[3], *out = &c.t[4], *norm = &c.t[5];
    if (!packed(*w) || !blocks_fit(*w)) return "linear: not a packed weight";
    if (c.i[0] < 0 || c.i[0] > 1 || c.i[1] < 0 || c.i[1] > 4) return "linear: unknown preparation or activation";
    if (c.i[1] && (w->rows % 128 || residual->data)) return "linear: a gated one takes weights of 128 n rows, and no residual";
    if (!activations(*x) || x->cols != w->cols) return "linear: x must be float32, as wide as the weight";
    if (c.i[0] == 1 && (!norm->data || norm->dtype != PG_F32 || norm->rows != w->cols)) return "linear: the norm's weight must be float32, as wide as x";
    if (!activations(*out) || out->cols != (c.i[1] ? w->rows / 2 : w->rows)) return "linear: out must be float32, with one column per weight row (gated: two)";
    if (bias->data && (bias->dtype != PG_F32 || bias->rows != w->rows)) return "linear: bias must be float32, one per weight row";
    if (residual->data && (!activations(*residual) || residual->cols != w->rows)) return "linear: residual must be shaped as out";
    if (!c.t[6].data) return nullptr;
    if (const char* wrong = cache(c.t[6], c.t[7], c.i + 2)) return wrong;
    if (!c.t[8].data || c.t[8].dtype != PG_I32 || !c.t[9].data || c.t[9].dtype != PG_I32) return "linear: block table and lengths must be int32";
    return c.i[7] < 0 || c.i[7] > c.i[8] || c.i[8] > 65536 ? "linear: a share of pages is between 0 and 65536" : nullptr;
}
static inline const char* rope(const Call& c) {
    if (!activations(c.t[0]) || !activations(c.t[3]) || !same_cols(c.t[0], c.t[3])) return "rope: x and out must be float32 of one width";
    if (!index(c.t[1])) return "rope: positions must be int32 or int64";
    if (!activations(c.t[2]) || c.t[2].cols % 2 || c.t[2].cols > c.i[0]) return "rope: the table must be float32, even, not wider than a head";
    return c.i[0] < 1 || c.t[0].cols % c.i[0] ? "rope: head_dim must divide the width" : nullptr;
}
static inline const char* kv_write(const Call& c) {
    if (const char* wrong = cache(c.t[2], c.t[3], c.i)) return wrong;
    int64_t width = c.i[1] * c.i[2];
    if (!activations(c.t[0]) || !activations(c.t[1]) || c.t[0].cols != width || c.t[1].cols != width) return "kv_write: k and v must be float32, num_kv_heads * head_dim wide";
    return index(c.t[4]) ? nullptr : "kv_write: slots must be int32 or int64";
}
static inline const char* attention(const Call& c) {
    if (const char* wrong = cache(c.t[1], c.t[2], c.i)) return wrong;
    if (!activations(c.t[0]) || !activations(c.t[6]) || !same_cols(c.t[0], c.t[6])) return "attention: q and out must be float32 of one width";
    if (c.t[0].cols % (c.i[1] * c.i[2])) return "attention: the query heads must be a multiple of the key-value heads";
    for (int k = 3; k < 6; ++k)
        if (!c.t[k].data || c.t[k].dtype != PG_I32) return "attention: block table, query starts and lengths must be int32";
    const pg_tensor *keys = &c.t[7], *values = &c.t[8], *table = &c.t[11];
    if (!keys->data) return nullptr;
    const int64_t width = c.i[1] * c.i[2];
    if (!activations(*keys) || !activations(*values) || keys->cols != width || values->cols != width) return "attention: new keys and values must be float32, num_kv_heads * head_dim wide";
    if (!index(c.t[9]) || !index(c.t[10])) return "attention: slots and positions must be int32 or int64";
    return activations(*table) && table->cols % 2 == 0 && table->cols <= c.i[2] ? nullptr : "attention: the rotary table must be float32, even, not wider than a head";
}
static inline const char* act_and_mul(const Call& c) {
    if (!activations(c.t[0]) || !activations(c.t[1]) || c.t[0].cols != 2 * c.t[1].cols) return "act_and_mul: x must be float32, twice as wide as out";
    return c.i[0] < 0 || c.i[0] > 3 ? "act_and_mul: unknown activation" : nullptr;
}
static inline const char* pointwise(const Call& c, int n) {
    for (int k = 0; k < n; ++k)
        if (!activations(c.t[k]) || !same_cols(c.t[k], c.t[0])) return "operands must be float32 of one width";
    return nullptr;
}
static inline const char* add(const Call& c) { return pointwise(c, 3); }
static inline const char* scale(const Call& c) { return pointwise(c, 2); }
static inline const char* soft_cap(const Call& c) { return pointwise(c, 2); }
static inline const char* gather_rows(const Call& c) {
    if (!activations(c.t[0]) || !activations(c.t[2]) || !same_cols(c.t[0], c.t[2])) return "gather_rows: x and out must be float32 of one width";
    return index(c.t[1]) ? nullptr : "gather_rows: indices must be int32 or int64";
}
static inline const char* row_logsumexp(const Call& c) {
    return activations(c.t[0]) && c.t[1].data && c.t[1].dtype == PG_F32 ? nullptr : "row_logsumexp: logits and out must be float32";
}
static inline const char* row_is_finite(const Call& c) {
    return activations(c.t[0]) && c.t[1].data && c.t[1].dtype == PG_U8 ? nullptr : "row_is_finite: logits must be float32, out bool";
}
static inline const char* sample(const Call& c) {
    static const int32_t types[8] = {PG_F32, PG_F32, PG_I32, PG_F32, PG_F32, PG_U64, PG_I64, PG_I32};
    for (int k = 0; k < 8; ++k)
        if (!c.t[k].data || c.t[k].dtype != types[k]) return "sample: an operand has the wrong type";
    return activations(c.t[0]) ? nullptr : "sample: logits must be float32";
}
static inline const char* sample_masked(const Call& c) {
    static const int32_t types[10] = {PG_F32, PG_I32, PG_U8, PG_F32, PG_I32, PG_F32, PG_F32, PG_U64, PG_I64, PG_I32};
    for (int k = 0; k < 10; ++k)
        if (!c.t[k].data || (c.t[k].dtype != types[k] && !(k == 1 && index(c.t[1])))) return "sample_masked: an operand has the wrong type";
    if (c.t[2].stride < c.t[2].cols || c.t[2].cols * 8 < c.t[0].cols) return "sample_masked: a mask needs a bit for every logit";
    return activations(c.t[0]) ? nullptr : "sample_masked: logits must be float32";
}
static inline const char* mark(const Call&) { return nullptr; }

}  // namespace pg::checks
