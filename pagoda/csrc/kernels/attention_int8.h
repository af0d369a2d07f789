// Attention over a cache of 8 bits: keys are bytes and a scale, stored with 128 added; values are bytes and a scale.
//
// A query is integers and one scale: of 8 bits where bytes are multiplied, of 16 where words are, and its sums with keys are exact. So are
// the weights of a tile, with the values' scales: integers and one scale, which makes the largest 255 or 32,767, and their sums with values. In
// the first tile of a sequence weights of 8 bits have a second digit: its first token may outweigh the others by so much that they would vanish.
#pragma once

struct Int8Cache {
    using Element = int8_t;
#if defined(PG_HAS_DOT_U8)
    using Act = Int8;
    using Weight = uint8_t;
    static constexpr float kMostWeight = 255.0f;
    static constexpr int kDigits = 2, kWeightRow = 160;   // [digit] of { 64 weights, what one stands for }
#else
    using Act = Int16;
    using Weight = int16_t;
    static constexpr float kMostWeight = 32767.0f;
    static constexpr int kDigits = 1, kWeightRow = 80;
#endif
    static constexpr int kPair = 4, kScoreRows = kTileRows, kSteps = Act::kSteps / 8;   // products for four values of a key
    static constexpr float kUnit = Bf16Cache::kUnit;
    static constexpr bool kIsInteger = true;

    // What one of the integers behind it stands for, and -128 times their sum.
    struct Query {
        float step;
        int32_t start, unused[2];
    };
    static int64_t query_bytes(int64_t dim) { return int64_t(sizeof(Query)) + int64_t(sizeof(Act::Element)) * round_up(dim, 16); }
    static void load_query(const float* x, float scale, int64_t dim, char* q) {
        const float most = largest_of(x, dim), inverse = is_divisor(most) ? Act::kMost / most : 0.0f;
        i32x16 sums = iset1(0);
        Act::Element* integers = (Act::Element*)(q + sizeof(Query));
        for (int64_t d = 0; d < dim; d += 16) {
            const f32x16 v = dim - d >= 16 ? load(x + d) : load_n(x + d, dim - d);
            const i32x16 n = inverse > 0 ? round_i32(mul(v, set1(inverse))) : iset1(0);
            sums = iadd(sums, n);
            Act::put(integers + d, n);
        }
        const Query head = {scale * (most < INFINITY ? most * (1.0f / Act::kMost) : NAN), -128 * sum_lanes(sums), {}};
        memcpy(q, &head, sizeof head);
    }

    // Sums, of which `score` makes scores. Not here: GCC 12 would keep the sums on the stack if anything but stores followed the loop.
    template <int kR, int kP, bool kFetch>
    PG_INLINE void scores(const char* q, int64_t q_bytes, const char* const* keys, const char* const* next, int64_t dim,
                          const float*, float* s, int64_t s_row) {
        Act::Sum sums[kR][kP];
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) sums[b][p].begin(((const Query*)(q + b * q_bytes))->start);
        for (int64_t d = 0; d < dim / 4; ++d) {
            if constexpr (kFetch)
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) __builtin_prefetch(next[p] + 64 * d, 0, 2);
            step<0>(q + sizeof(Query) + 4 * kSteps * d, q_bytes, keys, 64 * d, sums);
        }
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) store_bytes(s + b * s_row + 16 * p, sums[b][p].lanes);
    }
    // The S-th product of four values of each key.
    template <int S, int kR, int kP>
    PG_INLINE void step(const char* integers, int64_t q_bytes, const char* const* keys, int64_t at, Act::Sum (&sums)[kR][kP]) {
        if constexpr (S < kSteps) {
            u8x64 column[kP];
#pragma GCC unroll 4
            for (int p = 0; p < kP; ++p) column[p] = step_of<Act, S>(load_bytes(keys[p] + at));
#pragma GCC unroll 8
            for (int b = 0; b < kR; ++b) {
                const i32x16 word = load_word(integers + 4 * S + b * q_bytes);
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) sums[b][p].template add<0>(column[p], word);
            }
            step<S + 1>(integers, q_bytes, keys, at, sums);
        }
    }
    PG_INLINE f32x16 score(const float* sums, const char* q, const char* keys, int64_t dim, float start) {
        return fma(to_f32(load_bytes(sums)), mul(set1(((const Query*)q)->step), load((const float*)(keys + 16 * dim))), set1(start));
    }

    PG_INLINE f32x16 power(f32x16 x) { return vexp2_short(x); }
    PG_INLINE f32x16 shrink(f32x16 x) { return Bf16Cache::shrink(x); }
    // Integers, and behind them what one of them stands for. A key outside lanes [lo, hi) may have any scale.
    template <bool kMasked>
    PG_INLINE f32x16 weights(f32x16 sum, const f32x16* p, Weight* w, const float* scales, int64_t lo, int64_t hi, int digits) {
        f32x16 scaled[4];
        i32x16 most = iset1((127 - 90) << 23);   // what is smaller than 2^-90 counts as nothing
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) {
            scaled[g] = mul(p[g], load(scales + 16 * g));
            if constexpr (kMasked) scaled[g] = keep_lanes(scaled[g], lo - 16 * g, hi - 16 * g, zero());
            most = imax(most, bits(scaled[g]));
            sum = add(sum, p[g]);
        }
        const f32x16 top = unbits(largest_everywhere(most));
        if (digits == 2) {
            const f32x16 inverse = div(set1(65535.0f), top), step = mul(top, set1(1.0f / 65535.0f));
            Weight* low = w + kWeightRow / 2;
#pragma GCC unroll 4
            for (int g = 0; g < 4; ++g) {
                const i32x16 both = round_i32(mul(scaled[g], inverse));
                Act::put((Act::Element*)w + 16 * g, words<8, 255>(both));
                Act::put((Act::Element*)low + 16 * g, words<0, 255>(both));
            }
            store_n((float*)(w + 64), mul(step, set1(256.0f)), 1);
            store_n((float*)(low + 64), step, 1);
            return sum;
        }
        const f32x16 inverse = div(set1(kMostWeight), top);
#pragma GCC unroll 4
        for (int g = 0; g < 4; ++g) Act::put((Act::Element*)w + 16 * g, round_i32(mul(scaled[g], inverse)));
        store_n((float*)(w + 64), mul(top, set1(1.0f / kMostWeight)), 1);
        return sum;
    }
    PG_INLINE float step_of_weights(const Weight* w) {
        float step;
        memcpy(&step, w + 64, 4);
        return step;
    }
    PG_INLINE u8x64 load_values(const int8_t* v, int64_t n) {   // [dim][4]
        if (n == 16) return load_bytes(v);
        int8_t t[64] = {};
        memcpy(t, v, size_t(4 * n));
        return load_bytes(t);
    }
    // Product S of four values of each column with their weights.
    template <int S>
    PG_INLINE i32x16 weigh(i32x16 sum, u8x64 four, const Weight* w) {
        const i32x16 word = load_word((const char*)w + 4 * S);
#if defined(PG_HAS_DOT_U8)
        return dot_u8(sum, word, four);
#else
        return dot_i16(sum, signed_words<S>(four), word);
#endif
    }
};
