// Products with float32 and bfloat16 panels: panel [K][16] of floats, or [K/2][16][2] of bfloat16 pairs.
//
// Every output is one accumulator that walks K from 0 up, whatever the tile it is computed in: the same bits for one
// row and for a thousand. Activations are read as stored, or, where bfloat16 is multiplied with bfloat16, from a rounded copy.
#pragma once

// A tile is kTileRows x kTilePanels, which reads memory best, or these, where that would leave a narrow tile or need one more.
constexpr int kFloatRows = kTilePanels >= 4 ? 8 : kTileRows, kFloatPanels = kTilePanels >= 4 ? 3 : kTilePanels;

struct F32Panels {
    using Element = float;
    static constexpr int kStep = 1;   // values of K a vector of weights holds per output
    static constexpr int kParts = 1;   // and in how many parts they are multiplied: each with all rows before the next, or registers run out
    template <int>
    PG_INLINE f32x16 step(f32x16 acc, const char* w, const float* x) { return fma(load((const float*)w), set1(*x), acc); }
};

struct Bf16Panels {
    using Element = Factor;
    static constexpr int kStep = 2, kParts = kPairParts;
    template <int kPart>
    PG_INLINE f32x16 step(f32x16 acc, const char* w, const Factor* x) { return dot_pair<kPart>(acc, load_bytes(w), x); }
};

template <class Panels, int kPart, int kRows, int kPanels>
PG_INLINE void float_step(const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes, f32x16 (&acc)[kRows][kPanels]) {
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) acc[a][p] = Panels::template step<kPart>(acc[a][p], w + p * panel_bytes, x + a * x_stride);
}

template <class Panels, int kRows, int kPanels>
static void float_tile(const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                       int64_t steps, int64_t r, int64_t n, Fetch& next, const Finish& finish) {
    Fetch ahead = next;
    finish.expect<kRows, kPanels>(r, n);
    f32x16 acc[kRows][kPanels];
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) acc[a][p] = zero();
    for (int64_t k = 0; k < steps; ++k) {
        if (kFetchSteps == 1 || k % kFetchSteps == 0) ahead.some();
        float_step<Panels, 0>(x + k * Panels::kStep, x_stride, w + k * 64, panel_bytes, acc);
        if constexpr (Panels::kParts == 2) float_step<Panels, 1>(x + k * Panels::kStep, x_stride, w + k * 64, panel_bytes, acc);
    }
    next = ahead;
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) finish(acc[a][p], r + a, n + 16 * p);
}

// A tile of `rows` rows, at most kRows.
template <class Panels, int kPanels, int kRows>
PG_INLINE void float_tile_of(int64_t rows, const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                             int64_t steps, int64_t r, int64_t n, Fetch& next, const Finish& finish) {
    if constexpr (kRows > 1)
        if (rows < kRows) return float_tile_of<Panels, kPanels, kRows - 1>(rows, x, x_stride, w, panel_bytes, steps, r, n, next, finish);
    float_tile<Panels, kRows, kPanels>(x, x_stride, w, panel_bytes, steps, r, n, next, finish);
}

template <class Panels, int kMostPanels, int kMostRows>
struct FloatRows {
    static constexpr int kPanels = kMostPanels, kRows = kMostRows;
    const Call& c;
    const typename Panels::Element* x;
    const int64_t x_stride;
    const Finish& finish;
    const int64_t steps, num_fetches, panel_bytes, row_bytes;

    FloatRows(const Call& call, const typename Panels::Element* rows, int64_t stride, const Finish& then)
        : c(call), x(rows), x_stride(stride), finish(then), steps((c.t[1].cols + Panels::kStep - 1) / Panels::kStep),
          num_fetches((steps + kFetchSteps - 1) / kFetchSteps), panel_bytes(steps * 64),
          row_bytes(c.t[1].cols * int64_t(sizeof(typename Panels::Element))) {}

    template <int kCount>
    void run(int64_t panel, int64_t r, int64_t end, Fetch& next) const {
        const char* w = static_cast<const char*>(c.t[1].data) + panel * panel_bytes;
        for (EvenTiles tile{r, end, kRows}; tile.next();)
            float_tile_of<Panels, kCount, kRows>(tile.rows, x + tile.row * x_stride, x_stride, w, panel_bytes, steps, tile.row, panel * 16, next, finish);
    }
};

template <class Panels>
static void float_product(const Call& c, const typename Panels::Element* x, int64_t x_stride, const Finish& finish, int tid, int num_threads) {
    const bool is_wide = c.rows > 2 * kFloatRows && (c.t[4].cols + 15) / 16 % (2 * kTilePanels) == 0;
    if (c.rows == 1) multiply_panels(c, FloatRows<Panels, kLonePanels, 1>(c, x, x_stride, finish), tid, num_threads);
    else if (is_wide) multiply_panels(c, FloatRows<Panels, kTilePanels, kTileRows>(c, x, x_stride, finish), tid, num_threads);
    else multiply_panels(c, FloatRows<Panels, kFloatPanels, kFloatRows>(c, x, x_stride, finish), tid, num_threads);
}
