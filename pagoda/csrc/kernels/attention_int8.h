// Attention over a cache of 8 bits: keys are bytes and a scale, stored with 128 added; values are bytes and a scale.
//
//     with products of bytes   the query is two signed digits of 8 bits, q = 256 h + l, and both products are exact integers. The scale of
//                              a value goes into its weight, and what is left is exact in bfloat16
//     with products of words   the query is one integer of 16 bits, as many as two digits have. The weights of a tile, with the values'
//                              scales, are rounded to 16 bits by the largest of them, and their sum with the values is an exact integer
#pragma once

#if defined(PG_HAS_DOT_U8)
struct Int8Cache {
    using Element = uint16_t;
    using Weight = Factor;
    static constexpr int kPair = 2, kScoreRows = kTileRows > 3 ? kTileRows / 3 : 1;   // two accumulators each
    static constexpr float kUnit = Bf16Cache::kUnit;
    static constexpr bool kHasScales = true, kIsInteger = false;

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
    PG_INLINE f32x16 power(f32x16 x) { return vexp2_short(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return Bf16Cache::shrink(x); }
    // `scales` are, for each group, 16 scales and their inverses. What is summed is the rounded weight without its scale, so that
    // a key alone gives its own value exactly.
    template <bool kMasked>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, Weight* w, const float* scales, int64_t lo, int64_t hi) {
        f32x16 scaled[4];
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            scaled[g] = mul(p[g], load(scales + 32 * g));
            if constexpr (kMasked) scaled[g] = keep_lanes(scaled[g], lo - 16 * g, hi - 16 * g, zero());
        }
        store_bytes(w, pack_bf16(scaled[0], scaled[1]));
        store_bytes(w + 32, pack_bf16(scaled[2], scaled[3]));
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            f32x16 rounded = mul(load_bf16(w + 16 * g), load(scales + 32 * g + 16));
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
#else
struct Int8Cache {
    using Element = int8_t;
    using Weight = int16_t;
    static constexpr int kPair = 2, kScoreRows = kTileRows;
    static constexpr float kUnit = Bf16Cache::kUnit;
    static constexpr bool kHasScales = true, kIsInteger = true;

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
    PG_INLINE f32x16 power(f32x16 x) { return vexp2_short(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return Bf16Cache::shrink(x); }
    // Integers, and behind them what one of them stands for. A key outside lanes [lo, hi) may have any scale.
    template <bool kMasked>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, int16_t* w, const float* scales, int64_t lo, int64_t hi) {
        f32x16 scaled[4];
        i32x16 most_lanes = iset1(0);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            scaled[g] = mul(p[g], load(scales + 32 * g));
            if constexpr (kMasked) scaled[g] = keep_lanes(scaled[g], lo - 16 * g, hi - 16 * g, zero());
            most_lanes = imax(most_lanes, magnitude(scaled[g]));
            sum = add(sum, p[g]);
        }
        const int32_t most_bits = largest(most_lanes);
        float most;
        memcpy(&most, &most_bits, 4);
        const float step = most_bits < 0x7f800000 ? most * (1.0f / 32767.0f) : NAN;
        const f32x16 inverse = set1(is_divisor(most) ? 32767.0f / most : 0.0f);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) store_i16(w + 16 * g, round_i32(mul(scaled[g], inverse)));
        memcpy(w + 64, &step, 4);
        return sum;
    }
    PG_INLINE float step_of(const int16_t* w) {
        float step;
        memcpy(&step, w + 64, 4);
        return step;
    }
    PG_INLINE i32x16 load_values(const int8_t* v, int64_t n) {   // [dim][2]
        if (n == 16) return load_i8_words(v);
        int8_t t[32] = {};
        memcpy(t, v, size_t(2 * n));
        return load_i8_words(t);
    }
};
#endif
