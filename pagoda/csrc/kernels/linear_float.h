// Products with float32 and bfloat16 panels: panel [K][16] of floats, or [K/2][16][2] of bfloat16 pairs.
//
// Every output is one accumulator that walks K from 0 up, whatever the tile it is computed in: the same bits for one
// row and for a thousand. Activations are read as stored (f32) or from a rounded copy (bf16).
#pragma once

// A tile is kTileRows x kTilePanels, which reads memory best, or these, where that would leave a narrow tile or need one more.
constexpr int kFloatRows = kTileRows >= 6 ? 8 : kTileRows, kFloatPanels = kTilePanels >= 4 ? 3 : kTilePanels;

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
    PG_MEMBER bool is_plain() const { return !gated && !bias->data && !residual->data; }
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
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) acc[a][p] = zero();
    for (int64_t k = 0; k < steps; ++k) {
        ahead.some();
#pragma GCC unroll 12
        for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 4
            for (int p = 0; p < kPanels; ++p)
                acc[a][p] = Panels::step(acc[a][p], w + p * panel_bytes + k * 64, x + a * x_stride + k * Panels::kStep);
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

// Tiles are as even as can be: one of a row or two at the end would wait for its own chains of additions.
template <class Panels, int kPanels, int kRows>
static void float_rows(const typename Panels::Element* x, int64_t x_stride, const char* w, int64_t panel_bytes,
                       int64_t steps, int64_t rows, int64_t n, Fetch& next, const Finish& finish) {
    int64_t r = 0;
    for (int64_t tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {
        const int64_t now = (rows - r + tiles - 1) / tiles;
        float_tile_of<Panels, kPanels, kRows>(now, x + r * x_stride, x_stride, w, panel_bytes, steps, r, n, next, finish);
        r += now;
    }
}

// Panels shared out in two halves, a few at a time: even threads walk the first half up and odd ones the second, then each helps in
// the other. So a thread knows what it will take next, walks memory upwards, and has as much to do as the others.
struct Halves {
    std::atomic<int64_t>* ticket;   // how many shares were taken of the second half and, in the low 32 bits, of the first
    int64_t count, first, share;    // panels of all, of the first half, of a share
    int64_t others;                 // threads in the same half
    bool is_odd;

    static Halves of(const Call& c, int64_t count, int64_t share, int tid, int num_threads) {
        return {c.ticket, count, num_threads > 1 ? (count + 1) / 2 : count, share, (num_threads - 1) / 2, tid % 2 == 1};
    }
    // Panels [begin, end).
    struct Range {
        int64_t begin, end;
    };
    PG_MEMBER Range place(bool second, int64_t n) const {
        const int64_t begin = (second ? first : 0) + n * share, stop = second ? count : first, end = begin + share;
        return {begin, end < stop ? end : stop};
    }
    // False when nothing is left. `likely` is what this thread will take after it; empty when it cannot tell.
    bool take(Range* now, Range* likely) const {
        for (const bool second : {is_odd, !is_odd}) {
            const uint64_t taken = uint64_t(ticket->fetch_add(second ? int64_t(1) << 32 : 1, std::memory_order_relaxed));
            const int64_t n = int64_t(second ? taken >> 32 : taken & 0xffffffff);
            *now = place(second, n);
            *likely = place(second, n + 1 + others);
            if (now->begin < now->end) return true;
        }
        return false;
    }
};

// A weight as panels, and who multiplies which.
template <class Panels, int kPanels, int kRows>
struct FloatProduct {
    using Element = typename Panels::Element;

    const Call& c;
    const Element* x;
    const int64_t x_stride;
    const Finish& finish;
    const int64_t steps, panel_bytes, panels;   // of a gated product the gate's
    const char* const weight;

    FloatProduct(const Call& call, const Element* rows, int64_t stride, const Finish& then)
        : c(call), x(rows), x_stride(stride), finish(then), steps((c.t[1].cols + Panels::kStep - 1) / Panels::kStep), panel_bytes(steps * 64),
          panels((c.t[4].cols + 15) / 16), weight(static_cast<const char*>(c.t[1].data)) {}

    Halves halves(int tid, int num_threads) const {
        const int64_t most = panels / ((c.rows == 1 ? 4 : 32) * num_threads) / kPanels * kPanels, least = panels / (2 * num_threads);
        return Halves::of(c, panels, most > 0 ? most : least > kPanels ? kPanels : least > 1 ? least : 1, tid, num_threads);
    }

    // One row reads panels as fast as memory gives them; with more, the panels that come next are fetched meanwhile.
    Fetch ahead(int64_t panel, int64_t end) const {
        const int64_t count = end - panel < kPanels ? end - panel : kPanels, tiles = (c.rows + kRows - 1) / kRows;
        return fetch(weight + panel * panel_bytes, c.rows > 1 ? count * panel_bytes : 0, steps * tiles, tiles == 1);
    }

    void run(int tid, int num_threads) const {
        const Halves shared = halves(tid, num_threads);
        Halves::Range now, likely;
        while (shared.take(&now, &likely))
            for (int64_t p = now.begin; p < now.end; p += kPanels) {
                const int64_t count = now.end - p < kPanels ? now.end - p : kPanels;
                Fetch next = p + kPanels < now.end ? ahead(p + kPanels, now.end) : ahead(likely.begin, likely.end);
                if (c.i[1]) {
                    Fetch factor = ahead(p + panels, p + panels + count);
                    multiply<kPanels>(p, count, factor);
                    multiply<kPanels>(p + panels, count, next);
                } else {
                    multiply<kPanels>(p, count, next);
                }
            }
    }

    // All rows against `count` panels, at most kCount.
    template <int kCount>
    void multiply(int64_t panel, int64_t count, Fetch& next) const {
        if constexpr (kCount > 1)
            if (count < kCount) return multiply<kCount - 1>(panel, count, next);
        float_rows<Panels, kCount, kRows>(x, x_stride, weight + panel * panel_bytes, panel_bytes, steps, c.rows, panel * 16, next, finish);
    }
};

template <class Panels>
static void float_product(const Call& c, const typename Panels::Element* x, int64_t x_stride, const Finish& finish, int tid, int num_threads) {
    const bool is_wide = c.rows > 2 * kFloatRows && (c.t[4].cols + 15) / 16 % (2 * kTilePanels) == 0;
    if (c.rows == 1) FloatProduct<Panels, kTilePanels, 1>(c, x, x_stride, finish).run(tid, num_threads);
    else if (is_wide) FloatProduct<Panels, kTilePanels, kTileRows>(c, x, x_stride, finish).run(tid, num_threads);
    else FloatProduct<Panels, kFloatPanels, kFloatRows>(c, x, x_stride, finish).run(tid, num_threads);
}
