// Ops on each element: the rows are shared out, a row is walked 16 columns at a time.
#pragma once

// y[r][d] = f(row r, d, n lanes) for all rows; f must not depend on which 16 columns it is asked for together.
template <class F>
PG_INLINE void each_vector(const Call& c, const pg_tensor& out, int num_threads, F f) {
    int64_t begin, end;
    while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
        for (int64_t r = begin; r < end; ++r) {
            float* y = row<float>(out, r);
            int64_t d = 0;
            for (; d + 16 <= out.cols; d += 16) store(y + d, f(r, d, 16));
            if (d < out.cols) store_n(y + d, f(r, d, out.cols - d), out.cols - d);
        }
}

PG_INLINE f32x16 load_some(const float* p, int64_t n) { return n == 16 ? load(p) : load_n(p, n); }

struct add_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        each_vector(c, c.t[2], num_threads, [&](int64_t r, int64_t d, int64_t n) __attribute__((always_inline)) {
            return add(load_some(row<float>(c.t[0], r) + d, n), load_some(row<float>(c.t[1], r) + d, n));
        });
    }
};

struct scale_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        f32x16 factor = set1(float(c.f[0]));
        each_vector(c, c.t[1], num_threads, [&](int64_t r, int64_t d, int64_t n) __attribute__((always_inline)) {
            return mul(load_some(row<float>(c.t[0], r) + d, n), factor);
        });
    }
};

struct soft_cap_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        f32x16 cap = set1(float(c.f[0]));
        each_vector(c, c.t[1], num_threads, [&](int64_t r, int64_t d, int64_t n) __attribute__((always_inline)) {
            return mul(cap, vtanh(div(load_some(row<float>(c.t[0], r) + d, n), cap)));
        });
    }
};

enum Activation { kSilu = 0, kGeluTanh = 1, kGelu = 2, kRelu = 3 };

template <int kKind>
PG_INLINE f32x16 activation(f32x16 x) {
    if constexpr (kKind == kSilu) return div(x, add(set1(1.0f), vexp(sub(zero(), x))));
    if constexpr (kKind == kRelu) return max(x, zero());
    if constexpr (kKind == kGeluTanh) {
        f32x16 inner = mul(set1(0.7978845608028654f), fma(mul(set1(0.044715f), mul(x, x)), x, x));
        return mul(mul(set1(0.5f), x), add(set1(1.0f), vtanh(inner)));
    }
    float t[16];
    store(t, x);
    for (int i = 0; i < 16; ++i) t[i] = 0.5f * t[i] * (1.0f + erff(t[i] * 0.70710678118654752f));
    return load(t);
}

PG_INLINE f32x16 activation_of(int64_t kind, f32x16 x) {
    switch (kind) {
        case kSilu: return activation<kSilu>(x);
        case kGeluTanh: return activation<kGeluTanh>(x);
        case kGelu: return activation<kGelu>(x);
        default: return activation<kRelu>(x);
    }
}

struct act_and_mul_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        const int64_t width = c.t[1].cols, kind = c.i[0];
        each_vector(c, c.t[1], num_threads, [&](int64_t r, int64_t d, int64_t n) __attribute__((always_inline)) {
            const float* gate = row<float>(c.t[0], r) + d;
            return mul(activation_of(kind, load_some(gate, n)), load_some(gate + width, n));
        });
    }
};
