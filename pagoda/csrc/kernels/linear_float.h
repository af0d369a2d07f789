// Products with float32 and bfloat16 panels: panel [K][16] of floats, or [K/2][16][2] of bfloat16 pairs.
//
// Every output is one accumulator that walks K from 0 up, whatever the tile it is computed in: the same bits for one
// row and for a thousand. Activations are read as stored (f32) or from a rounded copy (bf16).
#pragma once

struct F32Panels {
    using Element = float;
    static constexpr int kStep = 1;   // values of K a vector of weights holds per output
    PG_INLINE f32x16 step(f32x16 acc, const char* w, const float* x) { return fma(load((const float*)w), set1(*x), acc); }
};

struct Bf16Panels {
    using Element = uint16_t;
    static constexpr int kStep = 2;
    PG_INLINE f32x16 step(f32x16 acc, const char* w, const uint16_t* x) { return dot_bf16(acc, load_bytes(w), x); }
};

// Memory to be fetched piece by piece while something else is computed: a few cache lines with each step of a tile,
// because more at once would wait for each other. What is read once only shall not push everything else out of the caches
// (an interpreter that finds its own memory gone loses 60 us a step).
struct Fetch {
    const char* at;
    int64_t left, lines;   // bytes still to fetch; cache lines a step
    bool once;
    PG_MEMBER void some() {
        if (left <= 0) return;
        if (once)
            for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(at + 64 * n, 0, 0);
        else
            for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(at + 64 * n, 0, 2);
        at += 64 * lines;
        left -= 64 * lines;
    }
};
PG_INLINE Fetch fetch(const char* at, int64_t bytes, int64_t steps, bool once) { return {at, bytes, bytes / 64 / steps + 1, once}; }

// What happens to a finished accumulator: bias, residual, store. Of a gated product the first half of the outputs, the gate, is
// stored first and waits for the other half: y = activation(gate) * other.
struct Finish {
    const pg_tensor *bias, *residual, *out;
    int64_t num_outputs, gated;   // rows of the weight; 0, or 1 + which activation
    PG_MEMBER void operator()(f32x16 acc, int64_t r, int64_t n) const {
        if (gated) return gate(acc, r, n);
        int64_t count = out->cols - n < 16 ? out->cols - n : 16;
        if (bias->data) acc = add(acc, load_some(static_cast<const float*>(bias->data) + n, count));
        if (residual->data) acc = add(acc, load_some(row<float>(*residual, r) + n, count));
        float* y = row<float>(*out, r) + n;
        if (count == 16) store(y, acc);
        else store_n(y, acc, count);
    }
    void gate(f32x16 acc, int64_t r, int64_t n) const {
        if (bias->data) acc = add(acc, load(static_cast<const float*>(bias->data) + n));
        float* y = row<float>(*out, r);
        if (n < out->cols) store(y + n, acc);
        else store(y + n - out->cols, mul(activation_of(gated - 1, load(y + n - out->cols)), acc));
    }
};

template <class Panels, int kRows, int kPanels>
static void float_tile(const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                       int64_t steps, int64_t r, int64_t n, Fetch& next, const Finish& finish) {
    Fetch ahead = next;
    f32x16 acc[kRows][kPanels];
    for (int a = 0; a < kRows; ++a)
        for (int p = 0; p < kPanels; ++p) acc[a][p] = zero();
    for (int64_t k = 0; k < steps; ++k) {
        ahead.some();
#pragma GCC unroll 8
        for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p)
                acc[a][p] = Panels::step(acc[a][p], w + p * panel_bytes + k * 64, x + a * x_stride + k * Panels::kStep);
    }
    next = ahead;
    for (int a = 0; a < kRows; ++a)
        for (int p = 0; p < kPanels; ++p) finish(acc[a][p], r + a, n + 16 * p);
}

// A tile of `rows` rows, at most kRows.
template <class Panels, int kPanels, int kRows = kTileRows>
PG_INLINE void float_tile_of(int64_t rows, const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                             int64_t steps, int64_t r, int64_t n, Fetch& next, const Finish& finish) {
    if constexpr (kRows > 1)
        if (rows < kRows) return float_tile_of<Panels, kPanels, kRows - 1>(rows, x, x_stride, w, panel_bytes, steps, r, n, next, finish);
    float_tile<Panels, kRows, kPanels>(x, x_stride, w, panel_bytes, steps, r, n, next, finish);
}

// Tiles are as even as can be: one of a row or two at the end would wait for its own chains of additions.
template <class Panels, int kPanels>
static void float_rows(const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                       int64_t steps, int64_t rows, int64_t n, Fetch& next, const Finish& finish) {
    int64_t r = 0;
    for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
        const int64_t now = (rows - r + tiles - 1) / tiles;
        float_tile_of<Panels, kPanels>(now, x + r * x_stride, x_stride, w, panel_bytes, steps, r, n, next, finish);
        r += now;
    }
}

// All rows against panels [begin, end); panel `after`, unless negative, is likely to come then.
template <class Panels>
static void float_panels(const typename Panels::Element* x, int64_t x_stride, const pg_tensor& weight, int64_t rows,
                         int64_t begin, int64_t end, int64_t after, const Finish& finish) {
    const int64_t steps = (weight.cols + Panels::kStep - 1) / Panels::kStep, panel_bytes = steps * 64, panels = (weight.rows + 15) / 16;
    const char* w = static_cast<const char*>(weight.data);
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    int64_t p = begin;
    for (; p + kTilePanels <= end; p += kTilePanels) {
        const int64_t ahead = p + kTilePanels < end ? p + kTilePanels : after, left = ahead < 0 ? 0 : panels - ahead;
        const int64_t bytes = (left < kTilePanels ? left : kTilePanels) * panel_bytes;
        Fetch next = fetch(w + ahead * panel_bytes, rows > 1 ? bytes : 0, steps * tiles, tiles == 1);
        float_rows<Panels, kTilePanels>(x, x_stride, w + p * panel_bytes, panel_bytes, steps, rows, p * 16, next, finish);
    }
    Fetch nothing{};
    if constexpr (kTilePanels > 2)
        for (; p + 2 <= end; p += 2)
            float_rows<Panels, 2>(x, x_stride, w + p * panel_bytes, panel_bytes, steps, rows, p * 16, nothing, finish);
    for (; p < end; ++p)
        float_rows<Panels, 1>(x, x_stride, w + p * panel_bytes, panel_bytes, steps, rows, p * 16, nothing, finish);
}
