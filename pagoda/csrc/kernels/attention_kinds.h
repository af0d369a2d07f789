// What of attention depends on the type of the cache: how queries are kept, how scores are computed from a group of 16 keys,
// how they become weights, and what the weights are multiplied with.
//
//     f32    scores and weights in float, units of e
//     bf16   query, weights and both products in bfloat16 pairs, or the former two in float (Factor), units of log2(e)
//     int8   attention_int8.h
#pragma once

// 2^x for x <= 8 or so to 8e-5, a twenty-fifth of what rounding to bfloat16 then loses. NaN stays.
PG_INLINE f32x16 vexp2_short(f32x16 x) {
    const f32x16 r = fraction(x);
    return times_power(fma(fma(fma(set1(0.07802452f), r, set1(0.22606716f)), r, set1(0.69583356f)), r, set1(0.99992520f)), x);
}

template <class Panels, int kPart, int kR, int kP>
PG_INLINE void score_step(const typename Panels::Element* q, int64_t q_bytes, const char* const* keys, int64_t at, f32x16 (&acc)[kR][kP]) {
#pragma GCC unroll 8
    for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p)
            acc[b][p] = Panels::template step<kPart>(acc[b][p], keys[p] + at, (const typename Panels::Element*)((const char*)q + b * q_bytes));
}

// kR queries, `q_bytes` apart, times kP groups of 16 keys -> s, rows `s_row` apart, group p at 16 p, each row beginning
// with its number of `start`. With kFetch lines of `next` are asked for on the way.
template <class Panels, int kR, int kP, bool kFetch>
PG_INLINE void float_scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                            const float* start, float* s, int64_t s_row) {
    f32x16 acc[kR][kP];
#pragma GCC unroll 8
    for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) acc[b][p] = set1(start[b]);
    const int64_t steps = dim / Panels::kStep;
    for (int64_t d = 0; d < steps; ++d) {
        if constexpr (kFetch)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) __builtin_prefetch(next[p] + 64 * d, 0, 2);
        score_step<Panels, 0>((const typename Panels::Element*)q + d * Panels::kStep, q_bytes, keys, 64 * d, acc);
        if constexpr (Panels::kParts == 2)
            score_step<Panels, 1>((const typename Panels::Element*)q + d * Panels::kStep, q_bytes, keys, 64 * d, acc);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) store(s + b * s_row + 16 * p, acc[b][p]);
}

struct F32Cache {
    using Element = float;   // of values as they are multiplied
    using Weight = float;
    static constexpr int kPair = 1, kScoreRows = kTileRows, kWeightRow = 64, kDigits = 1;
    static constexpr float kUnit = 1.0f;
    static constexpr bool kIsInteger = false;

    static int64_t query_bytes(int64_t dim) { return 4 * dim; }
    static void load_query(const float* x, float scale, int64_t dim, char* q) {
        float* y = (float*)q;
        for (int64_t d = 0; d < dim; ++d) y[d] = scale * x[d];
    }
    template <int kR, int kP, bool kFetch>
    PG_INLINE void scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                          const float* start, float* s, int64_t s_row) {
        float_scores<F32Panels, kR, kP, kFetch>(q, q_bytes, keys, next, dim, start, s, s_row);
    }
    PG_INLINE f32x16 power(f32x16 x) { return vexp(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return vexp(x); }
    // Four vectors of p, for 64 keys -> weights; returns the sums with them. A key outside lanes [lo, hi) may have any scale.
    template <bool kMasked>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, float* w, const float*, int64_t, int64_t, int) {
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            store(w + 16 * g, p[g]);
            sum = add(sum, p[g]);
        }
        return sum;
    }
    static constexpr int kParts = 1;
    PG_INLINE f32x16 load_values(const float* v, int64_t n) { return load_some(v, n); }
    template <int>
    PG_INLINE f32x16 weigh(f32x16 acc, f32x16 v, const float* w) { return fma(set1(*w), v, acc); }
};

struct Bf16Cache {
    using Element = uint16_t;
    using Weight = Factor;
    static constexpr int kPair = 2, kScoreRows = kTileRows, kWeightRow = 64, kDigits = 1;
    static constexpr float kUnit = 1.44269504088896341f;
    static constexpr bool kIsInteger = false;

    static int64_t query_bytes(int64_t dim) { return dim * int64_t(sizeof(Factor)); }
    static void load_query(const float* x, float scale, int64_t dim, char* q) {
        for (int64_t d = 0; d < dim; ++d) put_factor((Factor*)q + d, scale * x[d]);
    }
    template <int kR, int kP, bool kFetch>
    PG_INLINE void scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                          const float* start, float* s, int64_t s_row) {
        float_scores<Bf16Panels, kR, kP, kFetch>(q, q_bytes, keys, next, dim, start, s, s_row);
    }
    PG_INLINE f32x16 power(f32x16 x) { return vexp2_short(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return vexp(mul(x, set1(0.693147180559945f))); }
    // The weights that are summed are the rounded ones, in pairs.
    template <bool kMasked, class Weight>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, Weight* w, const float*, int64_t, int64_t, int) {
        if constexpr (sizeof(Weight) == 4) return F32Cache::weights<kMasked>(sum, p, w, nullptr, 0, 0, 1);
        static const Weight ones[2] = {0x3f80, 0x3f80};
#pragma GCC unroll 2
        for (int g = 0; g < 4; g += 2) {
            const u8x64 rounded = pack_bf16(p[g], p[g + 1]);
            store_bytes(w + 16 * g, rounded);
            sum = dot_pair<0>(sum, rounded, ones);
        }
        return sum;
    }
    PG_INLINE u8x64 load_values(const uint16_t* v, int64_t n) {   // [dim][2]
        if (n == 16) return load_bytes(v);
        uint16_t t[32] = {};
        for (int64_t i = 0; i < 2 * n; ++i) t[i] = v[i];
        return load_bytes(t);
    }
    static constexpr int kParts = kPairParts;
    template <int kPart>
    PG_INLINE f32x16 weigh(f32x16 acc, u8x64 v, const Factor* w) { return dot_pair<kPart>(acc, v, w); }
};
