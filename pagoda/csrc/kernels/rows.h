// One number per row of logits.
#pragma once

// exp(x) for x <= 0 in double precision, to about 1 ulp; 0 below -708. Branch-free, so that loops over it vectorise.
PG_INLINE double exp_double(double x) {
    double clamped = x > -708.0 ? x : -708.0;   // NaN becomes -708
    double shifted = clamped * 1.4426950408889634 + 6755399441055744.0;
    double n = shifted - 6755399441055744.0;
    double r = (clamped - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
    double p = 1.6059043836821613e-10;
    p = p * r + 2.0876756987868099e-9;
    p = p * r + 2.5052108385441720e-8;
    p = p * r + 2.7557319223985893e-7;
    p = p * r + 2.7557319223985888e-6;
    p = p * r + 2.4801587301587302e-5;
    p = p * r + 1.9841269841269841e-4;
    p = p * r + 1.3888888888888889e-3;
    p = p * r + 8.3333333333333333e-3;
    p = p * r + 4.1666666666666667e-2;
    p = p * r + 1.6666666666666667e-1;
    p = p * r + 0.5;
    p = (p * r) * r + r + 1.0;
    uint64_t u, k;
    __builtin_memcpy(&u, &p, 8);
    __builtin_memcpy(&k, &shifted, 8);
    u += k << 52;
    __builtin_memcpy(&p, &u, 8);
    return x > -708.0 ? p : 0.0;
}

// The largest of a row, NaN passed over; -inf when there is nothing else.
PG_INLINE float row_max(const float* x, int64_t n) {
    f32x16 most = set1(-INFINITY);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) most = max(load(x + i), most);
    float top = reduce_max(most);
    for (; i < n; ++i) top = x[i] > top ? x[i] : top;
    return top;
}

// What the sampler asks first of a row: its largest logit, and whether it holds NaN or +inf. One pass.
PG_INLINE float row_top(const float* x, int64_t n, bool* is_bad) {
    const f32x16 infinite = set1(INFINITY), yes = set1(1.0f);
    f32x16 most = set1(-INFINITY), bad = zero();
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        f32x16 v = load(x + i);
        most = max(v, most);
        bad = select_lt(v, infinite, bad, yes);   // a comparison with NaN is false
    }
    float top = reduce_max(most);
    *is_bad = reduce_max(bad) > 0;
    for (; i < n; ++i) {
        top = x[i] > top ? x[i] : top;
        *is_bad |= !(x[i] < INFINITY);
    }
    return top;
}

// The first place of a value that is known to be there.
PG_INLINE int32_t row_find(const float* x, int64_t n, float value) {
    int64_t i = 0;
    while (i + 64 <= n && row_max(x + i, 64) < value) i += 64;
    while (x[i] != value) ++i;
    return int32_t(i);
}

struct row_logsumexp_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                const float* x = row<float>(c.t[0], r);
                const int64_t n = c.t[0].cols;
                const double top = row_max(x, n);
                double sums[16] = {}, total = 0;
                int64_t i = 0;
                if (top > -INFINITY && top < INFINITY)
                    for (; i + 16 <= n; i += 16)
                        for (int k = 0; k < 16; ++k) sums[k] += exp_double(double(x[i + k]) - top);
                for (int k = 0; i < n; ++i, ++k) sums[k % 16] += top > -INFINITY ? exp_double(double(x[i]) - top) : 0.0;
                for (int k = 0; k < 16; ++k) total += sums[k];
                static_cast<float*>(c.t[1].data)[r] = total > 0 ? float(log(total) + top) : -INFINITY;
            }
    }
};

struct row_is_finite_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                bool is_bad;
                float top = row_top(row<float>(c.t[0], r), c.t[0].cols, &is_bad);
                static_cast<uint8_t*>(c.t[1].data)[r] = uint8_t(!is_bad && top > -INFINITY);
            }
    }
};
