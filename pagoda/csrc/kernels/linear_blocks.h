// Products with block-quantised panels (q8_0, q4_0, q4_1; drawn in pagoda/kernels/weight.py).
//
// A row of activations is quantised in blocks of 32 to 16 bits, kept as two bytes: value = 256 * high + low, so that the
// byte dot products of the hardware do the work. (8 bits would halve it, at a KL divergence of 0.004 on the default
// model, enough to change its answers.) Within a block the product is exact integer arithmetic; between blocks one float
// accumulator per output walks K from 0 up: acc = fma(integer, dw * dx, acc), and for q4_1 another fma with the minimum
// and the block's activation sum. The same bits for any number of rows.
#pragma once

// A quantised row:   int8 high[K] | int8 low[K] | float d[K/32] | float dsum[K/32] = d * sum(value) | int32 sum[K/32]
struct QuantRow {
    const int8_t *high, *low;
    const float *d, *dsum;
    const int32_t* sum;

    static int64_t bytes(int64_t k) { return round_up(2 * k + k / 32 * 12, 64); }
    PG_INLINE QuantRow at(const char* p, int64_t k) {
        const float* d = (const float*)(p + 2 * k);
        return {(const int8_t*)p, (const int8_t*)p + k, d, d + k / 32, (const int32_t*)(d + k / 32 * 2)};
    }
};

static void quantise_row(const float* x, char* to, int64_t k) {
    constexpr float kMost = 127.0f * 256.0f;   // the high byte stays within +-127 after rounding
    int8_t *high = (int8_t*)to, *low = high + k;
    float* d = (float*)(to + 2 * k);
    float* dsum = d + k / 32;
    int32_t* sum = (int32_t*)(dsum + k / 32);
    for (int64_t b = 0; b < k / 32; ++b) {
        const float* v = x + 32 * b;
        float most = 0;
        for (int i = 0; i < 32; ++i) most = fabsf(v[i]) > most ? fabsf(v[i]) : most;
        float scale = most / kMost, inverse = most > 1.0e-30f ? kMost / most : 0.0f;
        int32_t total = 0, bad = 0;
        for (int i = 0; i < 32; ++i) {
            // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
            float shifted = v[i] * inverse + 12582912.0f;
            int32_t value;
            __builtin_memcpy(&value, &shifted, 4);
            value -= 0x4B400000;
            high[32 * b + i] = int8_t((value + 128) >> 8);
            low[32 * b + i] = int8_t(value);
            total += value;
            bad |= !(fabsf(v[i]) <= 3.0e38f);
        }
        d[b] = bad ? NAN : scale;   // NaN and infinity in a row must come out as NaN
        sum[b] = bad ? 0 : total;
        dsum[b] = d[b] * float(sum[b]);
    }
}

struct Q8_0 {
    static constexpr int kBytes = 32 + 512, kZero = 128;
    static constexpr bool kHasMin = false;
};
struct Q4_0 {
    static constexpr int kBytes = 32 + 256, kZero = 8;
    static constexpr bool kHasMin = false;
};
struct Q4_1 {
    static constexpr int kBytes = 64 + 256, kZero = 0;
    static constexpr bool kHasMin = true;
};

// high[a] += sum of w * high byte, low[a] += sum of w * low byte, over the 32 weights of block b.
template <class Format, int kRows>
PG_INLINE void block_dots(const char* data, const QuantRow* x, int64_t b, i32x16* high, i32x16* low) {
    if constexpr (Format::kBytes >= 512) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            u8x64 w = load_bytes(data + 64 * j);
            const int64_t at = 32 * b + 4 * j;
#pragma GCC unroll 8
            for (int a = 0; a < kRows; ++a) {
                high[a] = dot_u8(high[a], w, x[a].high + at);
                low[a] = dot_u8(low[a], w, x[a].low + at);
            }
        }
    } else {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            u8x64 w = load_bytes(data + 64 * j), first = low_nibbles(w), second = high_nibbles(w);
            const int64_t at = 32 * b + 4 * j;
#pragma GCC unroll 8
            for (int a = 0; a < kRows; ++a) {
                high[a] = dot_u4(dot_u4(high[a], first, x[a].high + at), second, x[a].high + at + 16);
                low[a] = dot_u4(dot_u4(low[a], first, x[a].low + at), second, x[a].low + at + 16);
            }
        }
    }
}

template <class Format, int kRows>
static void block_tile(const char* rows, int64_t row_bytes, const char* w, int64_t k, int64_t r, int64_t n, const Finish& finish) {
    QuantRow x[kRows];
    for (int a = 0; a < kRows; ++a) x[a] = QuantRow::at(rows + a * row_bytes, k);
    f32x16 acc[kRows];
    for (int a = 0; a < kRows; ++a) acc[a] = zero();
    for (int64_t b = 0; b < k / 32; ++b, w += Format::kBytes) {
        i32x16 high[kRows], low[kRows];
        for (int a = 0; a < kRows; ++a) {
            high[a] = iset1(0);
            low[a] = iset1(-Format::kZero * x[a].sum[b]);
        }
        block_dots<Format, kRows>(w + (Format::kHasMin ? 64 : 32), x, b, high, low);
        f32x16 d = load_f16(w);
        for (int a = 0; a < kRows; ++a) acc[a] = fma(to_f32(iadd(shift_left<8>(high[a]), low[a])), mul(d, set1(x[a].d[b])), acc[a]);
        if constexpr (Format::kHasMin) {
            f32x16 m = load_f16(w + 32);
            for (int a = 0; a < kRows; ++a) acc[a] = fma(m, set1(x[a].dsum[b]), acc[a]);
        }
    }
    for (int a = 0; a < kRows; ++a) finish(acc[a], r + a, n);
}

template <class Format, int kRows = kBlockRows>
static void block_rows(const char* x, int64_t row_bytes, const char* w, int64_t k, int64_t r, int64_t rows, int64_t n, const Finish& finish) {
    while (rows >= kRows) {
        block_tile<Format, kRows>(x, row_bytes, w, k, r, n, finish);
        x += kRows * row_bytes;
        r += kRows;
        rows -= kRows;
    }
    if constexpr (kRows > 1)
        if (rows) block_rows<Format, kRows - 1>(x, row_bytes, w, k, r, rows, n, finish);
}

template <class Format>
static void block_panels(const char* x, const pg_tensor& weight, int64_t rows, int64_t begin, int64_t end, const Finish& finish) {
    const int64_t k = weight.cols, panel_bytes = k / 32 * Format::kBytes;
    for (int64_t p = begin; p < end; ++p)
        block_rows<Format>(x, QuantRow::bytes(k), static_cast<const char*>(weight.data) + p * panel_bytes, k, 0, rows, p * 16, finish);
}
