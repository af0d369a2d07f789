// Products with 8-bit weights that have one scale an output (format i8), of rows rounded to 8 bits with one scale a row.
//
// All of K is exact integer arithmetic, nothing but dot products: any order of them gives the same bits, for one row and for a
// thousand. What makes one scale a row good enough is that both sides are turned by the same orthogonal matrix first, which spreads
// outliers over the whole row (as QuaRot does, https://arxiv.org/abs/2404.00456): x W^T = (x U) (W U)^T / K with U symmetric,
// U U = K: a Hadamard matrix within blocks of 2^p, the largest power of two that divides K, and a Hartley matrix, cos + sin of
// 2 pi a b / m, across the m = K / 2^p blocks. The weight's packer did its half of it, 1 / K included.
//
// A panel is { 16 scales as floats, K / 4 vectors of bytes, value + 128 }; after the last panel come the cosines of 2 pi a b / m for
// 1 <= a, b <= m / 2, then the sines.
#pragma once

PG_INLINE int64_t i8_panel_bytes(int64_t k) { return 64 + 16 * k; }
PG_INLINE const float* i8_cosines(const pg_tensor& w) { return (const float*)((const char*)w.data + (w.rows + 15) / 16 * i8_panel_bytes(w.cols)); }
PG_INLINE int64_t i8_row_bytes(int64_t k) { return 64 + round_up(k * int64_t(sizeof(Int8Row::Element)), 64); }
PG_INLINE int64_t i8_room_bytes(int64_t k) { return round_up(2 * k * 4, 64); }

// A rounded row: this, then K integers as Int8Row keeps them.
struct I8Row {
    float d;
    int32_t start;   // -128 * sum: what the weights' offset adds
};

// The Hadamard matrix of 16, times the lanes.
template <int kBit>
PG_INLINE f32x16 butterfly(f32x16 v) {
    alignas(64) float signs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) signs[i] = i & kBit ? -1.0f : 1.0f;
    return fma(v, load(signs), swap_lanes<kBit>(v));
}
PG_INLINE f32x16 hadamard(f32x16 v) { return butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(v)))); }

// The Hadamard matrix of 4 on vectors h apart.
PG_INLINE void four_apart(float* x, int64_t h, f32x16 a, f32x16 b, f32x16 c, f32x16 d) {
    const f32x16 ab = add(a, b), a_b = sub(a, b), cd = add(c, d), c_d = sub(c, d);
    store(x, add(ab, cd));
    store(x + h, add(a_b, c_d));
    store(x + 2 * h, sub(ab, cd));
    store(x + 3 * h, sub(a_b, c_d));
}

// y = x (Hartley (x) I) of m = 2 half + 1 blocks, in which b and m - b come as sum and difference: cos + sin of an angle and of its opposite
// share their products. x is overwritten. kVectors of a block at a time.
template <int kVectors>
static void hartley(float* x, float* y, int64_t block, int64_t half, const float* cosines) {
    const int64_t m = 2 * half + 1;
    const float* sines = cosines + half * half;
    for (int64_t j = 0; j < block; j += 16) {
        f32x16 total = load(x + j);
        for (int64_t b = 1; b <= half; ++b) {
            float *low = x + b * block + j, *high = x + (m - b) * block + j;
            const f32x16 u = load(low), v = load(high), sum = add(u, v);
            total = add(total, sum);
            store(low, sum);
            store(high, sub(u, v));
        }
        store(y + j, total);
    }
    for (int64_t a = 1; a <= half; ++a, cosines += half, sines += half)
        for (int64_t j = 0; j < block; j += 16 * kVectors) {
            f32x16 even[kVectors], odd[kVectors];
            for (int i = 0; i < kVectors; ++i) even[i] = load(x + j + 16 * i), odd[i] = zero();
            for (int64_t b = 1; b <= half; ++b) {
                const f32x16 co = set1(cosines[b - 1]), si = set1(sines[b - 1]);
                const float *low = x + b * block + j, *high = x + (m - b) * block + j;
                for (int i = 0; i < kVectors; ++i) even[i] = fma(co, load(low + 16 * i), even[i]), odd[i] = fma(si, load(high + 16 * i), odd[i]);
            }
            for (int i = 0; i < kVectors; ++i) {
                store(y + a * block + j + 16 * i, add(even[i], odd[i]));
                store(y + (m - a) * block + j + 16 * i, sub(even[i], odd[i]));
            }
        }
}

// x U, in x or in y; x is overwritten. k is a multiple of 16.
static const float* rotate(float* x, float* y, int64_t k, const float* cosines) {
    const int64_t block = k & -k, half = k / block / 2;
    int64_t h = 16;
    if (block >= 64) {
        for (int64_t i = 0; i < k; i += 64)
            four_apart(x + i, 16, hadamard(load(x + i)), hadamard(load(x + i + 16)), hadamard(load(x + i + 32)), hadamard(load(x + i + 48)));
        h = 64;
    } else {
        for (int64_t i = 0; i < k; i += 16) store(x + i, hadamard(load(x + i)));
    }
    for (; 4 * h <= block; h *= 4)
        for (int64_t i = 0; i < k; i += 4 * h)
            for (int64_t j = i; j < i + h; j += 16) four_apart(x + j, h, load(x + j), load(x + j + h), load(x + j + 2 * h), load(x + j + 3 * h));
    for (; h < block; h *= 2)
        for (int64_t i = 0; i < k; i += 2 * h)
            for (int64_t j = i; j < i + h; j += 16) {
                const f32x16 a = load(x + j), b = load(x + j + h);
                store(x + j, add(a, b));
                store(x + j + h, sub(a, b));
            }
    if (half == 0) return x;
    if (block >= 64) hartley<4>(x, y, block, half, cosines);
    else hartley<1>(x, y, block, half, cosines);
    return y;
}

// Rounds x, which is overwritten, into `row`; `room` is for k floats.
static void i8_round_row(float* x, float* room, char* row, int64_t k, const float* cosines) {
    const float* turned = rotate(x, room, k, cosines);
    i32x16 most_lanes = iset1(0);
    for (int64_t i = 0; i < k; i += 16) most_lanes = imax(most_lanes, magnitude(load(turned + i)));
    const int32_t most_bits = largest(most_lanes);
    float most;
    __builtin_memcpy(&most, &most_bits, 4);
    const f32x16 inverse = set1(most > 1.0e-30f ? 127.0f / most : 0.0f);
    i32x16 sums = iset1(0);
    Int8Row::Element* q = (Int8Row::Element*)(row + 64);
    for (int64_t i = 0; i < k; i += 16) {
        const i32x16 rounded = round_i32(mul(load(turned + i), inverse));
        sums = iadd(sums, rounded);
        Int8Row::put(q + i, rounded);
    }
    const int32_t sum = sum_lanes(sums);
    // NaN and infinity in a row must come out as NaN
    *(I8Row*)row = {most_bits < 0x7f800000 ? most / 127.0f : NAN, int32_t(0u - 128u * uint32_t(sum))};
}

// Rows [kRow, kRows) of a tile. Recursion instead of loops: GCC 12 leaves an array of accumulators on the stack otherwise.
template <int kRow, int kRows, int kPanels>
PG_INLINE void i8_start(const char* x, int64_t row_bytes, Int8Row::Sum (&acc)[kRows][kPanels]) {
    if constexpr (kRow < kRows) {
        for (int p = 0; p < kPanels; ++p) acc[kRow][p].begin(((const I8Row*)(x + kRow * row_bytes))->start);
        i8_start<kRow + 1>(x, row_bytes, acc);
    }
}
template <int kRow, int kRows, int kPanels>
PG_INLINE void i8_dots(const char* x, int64_t row_bytes, const u8x64 (&w)[kPanels], Int8Row::Sum (&acc)[kRows][kPanels]) {
    if constexpr (kRow < kRows) {
        const i32x16 four = load_word(x + kRow * row_bytes);
        for (int p = 0; p < kPanels; ++p) acc[kRow][p].template add<0>(w[p], four);
        i8_dots<kRow + 1>(x, row_bytes, w, acc);
    }
}
// Four values of k: with bytes one product, with words two.
template <int S, int kRows, int kPanels>
PG_INLINE void i8_step(const char* at, int64_t panel_bytes, const char* x, int64_t row_bytes, Int8Row::Sum (&acc)[kRows][kPanels]) {
    if constexpr (S < Int8Row::kSteps / 8) {
        u8x64 v[kPanels];
        for (int p = 0; p < kPanels; ++p) v[p] = step_of<Int8Row, S>(load_bytes(at + p * panel_bytes));
        i8_dots<0>(x + 4 * S, row_bytes, v, acc);
        i8_step<S + 1>(at, panel_bytes, x, row_bytes, acc);
    }
}
template <int kRow, int kRows, int kPanels>
PG_INLINE void i8_store(char* sums, const Int8Row::Sum (&acc)[kRows][kPanels]) {
    if constexpr (kRow < kRows) {
        for (int p = 0; p < kPanels; ++p) store_bytes(sums + 64 * (kPanels * kRow + p), acc[kRow][p].lanes);
        i8_store<kRow + 1>(sums, acc);
    }
}

// Sums [rows][panels][16], scaled. Not inlined: the accumulators' registers would be shared with it.
static __attribute__((noinline)) void i8_finish(const char* sums, int rows, int panels, const char* x, int64_t row_bytes, const char* w, int64_t panel_bytes,
                                                int64_t r, int64_t n, const Finish& finish) {
    const bool is_plain = finish.is_plain() && n + 16 * panels <= finish.out->cols;
    for (int a = 0; a < rows; ++a) {
        const f32x16 d = set1(((const I8Row*)(x + a * row_bytes))->d);
        float* y = row<float>(*finish.out, r + a) + n;
        for (int p = 0; p < panels && n + 16 * p < finish.num_outputs; ++p, sums += 64) {
            const f32x16 value = mul(to_f32(load_bytes(sums)), mul(load((const float*)(w + p * panel_bytes)), d));
            if (is_plain) store(y + 16 * p, value);
            else finish(value, r + a, n + 16 * p);
        }
    }
}

template <int kRows, int kPanels>
static void i8_tile(const char* x, int64_t row_bytes, const char* w, int64_t k, int64_t r, int64_t n, Fetch& next, const Finish& finish) {
    Fetch ahead = next;
    finish.expect<kRows, kPanels>(r, n);
    const int64_t panel_bytes = i8_panel_bytes(k);
    Int8Row::Sum acc[kRows][kPanels];
    i8_start<0>(x, row_bytes, acc);
    constexpr int64_t kSize = sizeof(Int8Row::Element);
    const char *at = w + 64, *four = x + 64, *end = four + k * kSize;
    do {
        ahead.some();
        const char* soon = four + 16 * kSize;
#pragma GCC unroll 1
        do {
            i8_step<0>(at, panel_bytes, four, row_bytes, acc);
            at += 64;
            four += 4 * kSize;
        } while (four < soon);
    } while (four < end);
    next = ahead;
    alignas(64) char sums[64 * kRows * kPanels];
    i8_store<0>(sums, acc);
    i8_finish(sums, kRows, kPanels, x, row_bytes, w, panel_bytes, r, n, finish);
}

template <int kPanels, int kRows>
PG_INLINE void i8_tile_of(int64_t rows, const char* x, int64_t row_bytes, const char* w, int64_t k, int64_t r, int64_t n, Fetch& next,
                          const Finish& finish) {
    if constexpr (kRows > 1)
        if (rows < kRows) return i8_tile_of<kPanels, kRows - 1>(rows, x, row_bytes, w, k, r, n, next, finish);
    i8_tile<kRows, kPanels>(x, row_bytes, w, k, r, n, next, finish);
}

template <int kMostPanels, int kMostRows>
struct I8Rows {
    static constexpr int kPanels = kMostPanels, kRows = kMostRows;
    const Call& c;
    const char* x;
    const Finish& finish;
    const int64_t k, num_fetches, panel_bytes, row_bytes;

    I8Rows(const Call& call, const char* rows, const Finish& then)
        : c(call), x(rows), finish(then), k(c.t[1].cols), num_fetches(k / 16), panel_bytes(i8_panel_bytes(k)), row_bytes(i8_row_bytes(k)) {}

    template <int kCount>
    void run(int64_t panel, int64_t r, int64_t end, Fetch& next) const {
        const char* w = static_cast<const char*>(c.t[1].data) + panel * panel_bytes;
        for (EvenTiles tile{r, end, kRows}; tile.next();)
            i8_tile_of<kCount, kRows>(tile.rows, x + tile.row * row_bytes, row_bytes, w, k, tile.row, panel * 16, next, finish);
    }
};

static void i8_product(const Call& c, const char* x, const Finish& finish, int tid, int num_threads) {
    // More panels are written in longer runs, and few rows come out more even, but they want to stay in the first cache.
    constexpr int kWidePanels = kI8Panels > 1 ? 3 : kI8Panels, kWideRows = kI8Panels > 1 ? 8 : kI8Rows;
    const bool is_wide = c.rows <= 4 * kWideRows || kWidePanels * i8_panel_bytes(c.t[1].cols) <= 32 << 10;
    if (c.rows == 1) multiply_panels(c, I8Rows<kLoneI8Panels, 1>(c, x, finish), tid, num_threads);
    else if (is_wide) multiply_panels(c, I8Rows<kWidePanels, kWideRows>(c, x, finish), tid, num_threads);
    else multiply_panels(c, I8Rows<kI8Panels, kI8Rows>(c, x, finish), tid, num_threads);
}
