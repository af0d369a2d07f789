// What of attention depends on the type of the cache: how queries are kept, how scores are computed from a group of 16 keys,
// how they become weights, and what the weights are multiplied with.
//
//     f32    scores and weights in float, units of e
//     bf16   query, weights and both products in bfloat16 pairs, or the former two in float (Factor), units of log2(e)
//     int8   keys are bytes and a scale: the query is two signed digits of 8 bits, q = 256 h + l, or one integer of 16, and products are
//            exact integers. Values are bytes and a scale: the scale goes into the weight, and what is left is exact in bfloat16.
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
        if constexpr (Panels::kParts == 2) score_step<Panels, 1>((const typename Panels::Element*)q + d * Panels::kStep, q_bytes, keys, 64 * d, acc);
    }
#pragma GCC unroll 8
    for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) store(s + b * s_row + 16 * p, acc[b][p]);
}

struct F32Cache {
    using Element = float;   // of values as they are multiplied
    using Weight = float;
    static constexpr int kPair = 1, kScoreRows = kTileRows;
    static constexpr float kUnit = 1.0f;
    static constexpr bool kUnpacks = false;

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
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, float* w, const float*, int64_t, int64_t) {
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
    static constexpr int kPair = 2, kScoreRows = kTileRows;
    static constexpr float kUnit = 1.44269504088896341f;
    static constexpr bool kUnpacks = false;

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
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, Weight* w, const float*, int64_t, int64_t) {
        if constexpr (sizeof(Weight) == 4) return F32Cache::weights<kMasked>(sum, p, w, nullptr, 0, 0);
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

#if defined(PG_HAS_DOT_U8)
// Keys of 8 bits as offset bytes: the query is two signed digits of 8 bits.
struct DigitQueries {
    static constexpr int kScoreRows = kTileRows > 3 ? kTileRows / 3 : 1;   // two accumulators each

    // Of a query: its step, -128 times the sum of each digit (keys are stored with 128 added), then eight bytes for each four d:
    // the high digits and the low ones.
    struct Query {
        float step;
        int32_t high, low, unused;
    };
    static int64_t query_bytes(int64_t dim) { return int64_t(sizeof(Query)) + 2 * dim; }
    static void load_query(const float* x, float scale, int64_t dim, char* q) {
        const float most = largest_of(x, dim), inverse = is_divisor(most) ? 32639.0f / most : 0.0f;   // 127 * 256 + 127
        Query head = {scale * (most < INFINITY ? most * (1.0f / 32639.0f) : NAN), 0, 0, 0};
        i32x16 highs = iset1(0), lows = iset1(0);
        int8_t* digits = (int8_t*)q + sizeof(Query);
        for (int64_t d = 0; d < dim; d += 16) {
            const f32x16 v = dim - d >= 16 ? load(x + d) : load_n(x + d, dim - d), n = inverse > 0 ? to_f32(round_i32(mul(v, set1(inverse)))) : zero();
            const i32x16 high = round_i32(mul(add(n, set1(0.5f)), set1(1.0f / 256.0f)));   // never a tie
            const i32x16 low = round_i32(sub(n, mul(to_f32(high), set1(256.0f))));
            int8_t h[16], l[16];
            store_i8(h, high);
            store_i8(l, low);
            highs = iadd(highs, high);
            lows = iadd(lows, low);
            for (int64_t k = 0; k < 16 && d + k < dim; k += 4) {
                memcpy(digits + 2 * (d + k), h + k, 4);
                memcpy(digits + 2 * (d + k) + 4, l + k, 4);
            }
        }
        head.high = -128 * sum_lanes(highs);
        head.low = -128 * sum_lanes(lows);
        memcpy(q, &head, sizeof head);
    }
    template <int kR, int kP, bool kFetch>
    PG_INLINE void scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                          const float* start, float* s, int64_t s_row) {
        i32x16 high[kR][kP], low[kR][kP];
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) {
                high[b][p] = load_word(q + b * q_bytes + 4);
                low[b][p] = load_word(q + b * q_bytes + 8);
            }
#pragma GCC unroll 4
        for (int64_t d = 0; d < dim / 4; ++d) {
            if constexpr (kFetch)
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) __builtin_prefetch(next[p] + 64 * d, 0, 2);
            u8x64 column[kP];
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) column[p] = load_bytes(keys[p] + 64 * d);
#pragma GCC unroll 8
            for (int b = 0; b < kR; ++b) {
                const char* digits = q + b * q_bytes + sizeof(Query) + 8 * d;
                const i32x16 h = load_word(digits), l = load_word(digits + 4);
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) {
                    high[b][p] = dot_u8(high[b][p], column[p], h);
                    low[b][p] = dot_u8(low[b][p], column[p], l);
                }
            }
        }
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) {
                const f32x16 step = mul(set1(((const Query*)(q + b * q_bytes))->step), load((const float*)(keys[p] + 16 * dim)));
                store(s + b * s_row + 16 * p, fma(fma(to_f32(high[b][p]), set1(256.0f), to_f32(low[b][p])), step, set1(start[b])));
            }
    }
};
using Int8Queries = DigitQueries;
#else
// The same with 16-bit products: the query is one integer, kept as Int16 keeps activations.
struct WordQueries {
    static constexpr int kScoreRows = kTileRows;

    struct Query {
        float step;
        int32_t start, unused[2];
    };
    static int64_t query_bytes(int64_t dim) { return int64_t(sizeof(Query)) + 2 * round_up(dim, 16); }
    static void load_query(const float* x, float scale, int64_t dim, char* q) {
        const float most = largest_of(x, dim), inverse = is_divisor(most) ? 32639.0f / most : 0.0f;   // as many as two digits have
        i32x16 sums = iset1(0);
        int16_t* integers = (int16_t*)(q + sizeof(Query));
        for (int64_t d = 0; d < dim; d += 16) {
            const f32x16 v = dim - d >= 16 ? load(x + d) : load_n(x + d, dim - d);
            const i32x16 n = inverse > 0 ? round_i32(mul(v, set1(inverse))) : iset1(0);
            sums = iadd(sums, n);
            store_i16_0213(integers + d, n);
        }
        const Query head = {scale * (most < INFINITY ? most * (1.0f / 32639.0f) : NAN), -128 * sum_lanes(sums), {}};
        memcpy(q, &head, sizeof head);
    }
    template <int kR, int kP, bool kFetch>
    PG_INLINE void scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                          const float* start, float* s, int64_t s_row) {
        i32x16 sums[kR][kP];
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) sums[b][p] = load_word(q + b * q_bytes + 4);
        for (int64_t d = 0; d < dim / 4; ++d) {
            if constexpr (kFetch)
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) __builtin_prefetch(next[p] + 64 * d, 0, 2);
            step<0, kR, kP>(q + sizeof(Query) + 8 * d, q_bytes, keys, 64 * d, sums);
            step<8, kR, kP>(q + sizeof(Query) + 8 * d + 4, q_bytes, keys, 64 * d, sums);
        }
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) {
                const f32x16 unit = mul(set1(((const Query*)(q + b * q_bytes))->step), load((const float*)(keys[p] + 16 * dim)));
                store(s + b * s_row + 16 * p, fma(to_f32(sums[b][p]), unit, set1(start[b])));
            }
    }
    // Every other byte of the keys at `at`, the first or the second of each two.
    template <int kShift, int kR, int kP>
    PG_INLINE void step(const char* integers, int64_t q_bytes, const char* const* keys, int64_t at, i32x16 (&sums)[kR][kP]) {
        i32x16 column[kP];
#pragma GCC unroll 4
        for (int p = 0; p < kP; ++p) column[p] = words<kShift, 255>(load_bytes(keys[p] + at));
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b) {
            const i32x16 pair = load_word(integers + b * q_bytes);
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) sums[b][p] = dot_i16(sums[b][p], column[p], pair);
        }
    }
};
using Int8Queries = WordQueries;
#endif

struct Int8Cache : Int8Queries {
    using Element = uint16_t;
    using Weight = Factor;
    static constexpr int kPair = 2;
    static constexpr float kUnit = Bf16Cache::kUnit;
    static constexpr bool kUnpacks = true;

    PG_INLINE f32x16 power(f32x16 x) { return vexp2_short(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return Bf16Cache::shrink(x); }
    // `scales` are, for each group, 16 scales and their inverses. What is summed is the rounded weight without its scale, so that
    // a key alone gives its own value exactly.
    template <bool kMasked, class Weight>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, Weight* w, const float* scales, int64_t lo, int64_t hi) {
        f32x16 scaled[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            scaled[g] = mul(p[g], load(scales + 32 * g));
            if constexpr (kMasked) scaled[g] = keep_lanes(scaled[g], lo - 16 * g, hi - 16 * g, zero());
        }
        if constexpr (sizeof(Weight) == 4) {
            for (int g = 0; g < 4; ++g) store(w + 16 * g, scaled[g]), sum = add(sum, p[g]);
            return sum;
        }
        store_bytes(w, pack_bf16(scaled[0], scaled[1]));
        store_bytes(w + 32, pack_bf16(scaled[2], scaled[3]));
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            f32x16 rounded = mul(load_bf16((const uint16_t*)w + 16 * g), load(scales + 32 * g + 16));
            if constexpr (kMasked) rounded = keep_lanes(rounded, lo - 16 * g, hi - 16 * g, zero());
            sum = add(sum, rounded);
        }
        return sum;
    }
    PG_INLINE u8x64 load_values(const uint16_t* v, int64_t n) { return Bf16Cache::load_values(v, n); }
    static constexpr int kParts = kPairParts;
    template <int kPart>
    PG_INLINE f32x16 weigh(f32x16 acc, u8x64 v, const Factor* w) { return dot_pair<kPart>(acc, v, w); }
};
