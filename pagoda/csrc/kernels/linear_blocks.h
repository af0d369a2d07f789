// Products with block-quantised panels (q8_0, q4_0, q4_1; drawn in pagoda/kernels/weight.py).
//
// A row of activations is quantised to 16-bit integers in blocks of 32. (8 bits would halve the work, at a KL divergence
// of 0.004 on the default model, enough to change its answers.) Within a block the product is exact integer arithmetic,
// two values of k at a time; between blocks one float accumulator per output walks K from 0 up:
// acc = fma(integer, dw * dx, acc), and for q4_1 another fma with the minimum and the block's activation sum. The same
// bits for any number of rows.
#pragma once

// A quantised row is K / 32 of these. Shifting the 16-bit words of packed bytes and nibbles right brings up the k's of
// a group of four as (0, 2), then (1, 3), in the two halves of each output's lane: activations are kept in that order.
struct QuantBlock {
    int16_t q[32];
    float d, dsum;   // the step, and d * sum(q)
    int32_t sum;     // sum(q)
    int32_t unused;
};

PG_INLINE int64_t quant_row_bytes(int64_t k) { return round_up(k / 32 * int64_t(sizeof(QuantBlock)), 64); }

static void quantise_row(const float* x, QuantBlock* to, int64_t k) {
    for (int64_t b = 0; b < k / 32; ++b, ++to, x += 32) {
        float most = 0;
        for (int i = 0; i < 32; ++i) most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        const float scale = most / 32767.0f, inverse = most > 1.0e-30f ? 32767.0f / most : 0.0f;
        int32_t value[32], total = 0, bad = 0;
        for (int i = 0; i < 32; ++i) {
            // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
            float shifted = x[i] * inverse + 12582912.0f;
            __builtin_memcpy(&value[i], &shifted, 4);
            value[i] -= 0x4B400000;
            bad |= !(fabsf(x[i]) <= 3.0e38f);
        }
        for (int i = 0; i < 32; ++i) total += int16_t(value[i]);
        for (int i = 0; i < 32; i += 4) {
            to->q[i] = int16_t(value[i]);
            to->q[i + 1] = int16_t(value[i + 2]);
            to->q[i + 2] = int16_t(value[i + 1]);
            to->q[i + 3] = int16_t(value[i + 3]);
        }
        to->d = bad ? NAN : scale;   // NaN and infinity in a row must come out as NaN
        to->sum = total;
        to->dsum = to->d * float(total);
        to->unused = 0;
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

template <int kShift, int kMask, int kRows, int kPanels>
PG_INLINE void block_pairs(const u8x64 (&data)[kPanels], const char* x, int64_t row_bytes, i32x16 (&dots)[kRows][kPanels]) {
    i32x16 w[kPanels];
    for (int p = 0; p < kPanels; ++p) w[p] = words<kShift, kMask>(data[p]);
#pragma GCC unroll 8
    for (int a = 0; a < kRows; ++a) {
        i32x16 pair = load_pair(x + a * row_bytes);
        for (int p = 0; p < kPanels; ++p) dots[a][p] = dot_i16(dots[a][p], w[p], pair);
    }
}

// One block of kPanels panels times the same block of kRows rows: dots[row][panel] += integers.
template <class Format, int kRows, int kPanels>
PG_INLINE void block_dots(const char* w, int64_t panel_bytes, const char* x, int64_t row_bytes, i32x16 (&dots)[kRows][kPanels]) {
    constexpr bool kBytes = Format::kBytes >= 512;
#pragma GCC unroll 8
    for (int j = 0; j < (kBytes ? 8 : 4); ++j) {
        u8x64 data[kPanels];
        for (int p = 0; p < kPanels; ++p) data[p] = load_bytes(w + p * panel_bytes + 64 * j);
        if constexpr (kBytes) {
            block_pairs<0, 255>(data, x + 8 * j, row_bytes, dots);
            block_pairs<8, 255>(data, x + 8 * j + 4, row_bytes, dots);
        } else {
            block_pairs<0, 15>(data, x + 8 * j, row_bytes, dots);
            block_pairs<8, 15>(data, x + 8 * j + 4, row_bytes, dots);
            block_pairs<4, 15>(data, x + 32 + 8 * j, row_bytes, dots);
            block_pairs<12, 15>(data, x + 32 + 8 * j + 4, row_bytes, dots);
        }
    }
}

template <class Format, int kRows, int kPanels>
static void block_tile(const char* x, int64_t row_bytes, const char* w, int64_t panel_bytes, int64_t k, int64_t r, int64_t n, const Finish& finish) {
    f32x16 acc[kRows][kPanels];
    for (int a = 0; a < kRows; ++a)
        for (int p = 0; p < kPanels; ++p) acc[a][p] = zero();
    for (int64_t b = 0; b < k / 32; ++b, w += Format::kBytes, x += sizeof(QuantBlock)) {
        i32x16 dots[kRows][kPanels];
        for (int a = 0; a < kRows; ++a)
            for (int p = 0; p < kPanels; ++p) dots[a][p] = iset1(-Format::kZero * ((const QuantBlock*)(x + a * row_bytes))->sum);
        block_dots<Format, kRows, kPanels>(w + (Format::kHasMin ? 64 : 32), panel_bytes, x, row_bytes, dots);
        for (int p = 0; p < kPanels; ++p) {
            f32x16 d = load_f16(w + p * panel_bytes);
            for (int a = 0; a < kRows; ++a)
                acc[a][p] = fma(to_f32(dots[a][p]), mul(d, set1(((const QuantBlock*)(x + a * row_bytes))->d)), acc[a][p]);
            if constexpr (Format::kHasMin) {
                f32x16 m = load_f16(w + p * panel_bytes + 32);
                for (int a = 0; a < kRows; ++a) acc[a][p] = fma(m, set1(((const QuantBlock*)(x + a * row_bytes))->dsum), acc[a][p]);
            }
        }
    }
    for (int a = 0; a < kRows; ++a)
        for (int p = 0; p < kPanels; ++p) finish(acc[a][p], r + a, n + 16 * p);
}

template <class Format, int kPanels, int kRows = kBlockRows>
static void block_rows(const char* x, int64_t row_bytes, const char* w, int64_t panel_bytes, int64_t k, int64_t r, int64_t rows, int64_t n,
                       const Finish& finish) {
    while (rows >= kRows) {
        block_tile<Format, kRows, kPanels>(x, row_bytes, w, panel_bytes, k, r, n, finish);
        x += kRows * row_bytes;
        r += kRows;
        rows -= kRows;
    }
    if constexpr (kRows > 1)
        if (rows) block_rows<Format, kPanels, kRows - 1>(x, row_bytes, w, panel_bytes, k, r, rows, n, finish);
}

// All rows against panels [begin, end). With several rows two panels share each broadcast of activations; a single row
// streams one panel after the other.
template <class Format>
static void block_panels(const char* x, const pg_tensor& weight, int64_t rows, int64_t begin, int64_t end, const Finish& finish) {
    const int64_t k = weight.cols, panel_bytes = k / 32 * Format::kBytes, row_bytes = quant_row_bytes(k);
    const char* w = static_cast<const char*>(weight.data);
    int64_t p = begin;
    if (rows > 1)
        for (; p + kBlockPanels <= end; p += kBlockPanels)
            block_rows<Format, kBlockPanels>(x, row_bytes, w + p * panel_bytes, panel_bytes, k, 0, rows, p * 16, finish);
    for (; p < end; ++p) block_rows<Format, 1>(x, row_bytes, w + p * panel_bytes, panel_bytes, k, 0, rows, p * 16, finish);
}
