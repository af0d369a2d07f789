// Products with block-quantised panels (blocks.h), activations as 16-bit or as 8-bit integers in blocks of 32.
//
// Within a group of a block (32 values of k, or 16) the product is exact integer arithmetic; between groups one float accumulator per
// output walks K from 0 up: acc = fma(integer, dw * dx, acc), and with a minimum another fma with it and the block's
// activation sum. So the bits are the same for any number of rows, read from storage or unpacked first.
//
// Rows read each panel where it is stored, as many at a time as there are registers for. Where these are few (AVX2), many rows have panels
// unpacked into scratch first, while the next ones are fetched.
#pragma once

// A quantised row is K / 32 of these.
template <class Act>
struct QuantBlock {
    typename Act::Element q[32];
    float d, dsum;      // the step, and d * sum(q)
    int32_t start[2];   // -kZero * sum(q), of the whole block or of each of its groups
};

template <class Act>
PG_INLINE int64_t quant_row_bytes(int64_t k) { return round_up(k / 32 * int64_t(sizeof(QuantBlock<Act>)), 64); }

// -kZero * sum, wrapping: the integers of a row with NaN are anything.
template <class Format>
PG_INLINE int32_t without_zero(int32_t sum) { return int32_t(0u - uint32_t(Format::kZero) * uint32_t(sum)); }

template <class Format, class Act>
static void quantise_row(const float* x, char* row, int64_t k) {
    QuantBlock<Act>* to = (QuantBlock<Act>*)row;
    for (int64_t b = 0; b < k / 32; ++b, ++to, x += 32) {
        const f32x16 x0 = load(x), x1 = load(x + 16);
        const int32_t most_bits = largest_magnitude(x0, x1);
        float most;
        __builtin_memcpy(&most, &most_bits, 4);
        const f32x16 inverse = set1(most > 1.0e-30f ? Act::kMost / most : 0.0f);
        const i32x16 q0 = round_i32(mul(x0, inverse)), q1 = round_i32(mul(x1, inverse));
        Act::put(to->q, q0);
        Act::put(to->q + 16, q1);
        to->d = most_bits < 0x7f800000 ? most / Act::kMost : NAN;   // NaN and infinity in a row must come out as NaN
        if constexpr (Format::kGroups == 2) {
            to->start[0] = without_zero<Format>(sum_lanes(q0));
            to->start[1] = without_zero<Format>(sum_lanes(q1));
            to->dsum = 0;
        } else {
            const int32_t total = sum_lanes(iadd(q0, q1));
            to->start[0] = to->start[1] = without_zero<Format>(total);
            to->dsum = to->d * float(total);
        }
    }
}

// Products S, S + 1, ... of a group of kCount, which begins with the block's product kFirst.
template <class Panel, int kFirst, int kCount, int S, int kRows, int kPanels>
PG_INLINE void block_dots(const char* w, int64_t stride, int64_t b, const char* x, int64_t row_bytes, typename Panel::Act::Sum (&dots)[kRows][kPanels]) {
    if constexpr (S < kCount) {
        u8x64 v[kPanels];
#pragma GCC unroll 12
        for (int p = 0; p < kPanels; ++p) v[p] = Panel::template vector<kFirst + S>(w + p * stride, b);
#pragma GCC unroll 12
        for (int a = 0; a < kRows; ++a) {
            const i32x16 four = load_word(x + a * row_bytes + 4 * (kFirst + S));
#pragma GCC unroll 12
            for (int p = 0; p < kPanels; ++p) dots[a][p].template add<S>(v[p], four);
        }
        block_dots<Panel, kFirst, kCount, S + 1>(w, stride, b, x, row_bytes, dots);
    }
}

template <class Panel, int kGroup, int kRows, int kPanels>
PG_INLINE void block_group(const char* w, int64_t stride, int64_t b, const char* x, int64_t row_bytes, f32x16 (&acc)[kRows][kPanels]) {
    using Block = QuantBlock<typename Panel::Act>;
    constexpr int kSteps = Panel::Act::kSteps / Panel::kGroups;
    typename Panel::Act::Sum dots[kRows][kPanels];
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 12
        for (int p = 0; p < kPanels; ++p) dots[a][p].begin(Panel::kHasMin ? 0 : ((const Block*)(x + a * row_bytes))->start[kGroup]);   // a minimum, no offset
    block_dots<Panel, kGroup * kSteps, kSteps, 0>(w, stride, b, x, row_bytes, dots);
#pragma GCC unroll 12
    for (int p = 0; p < kPanels; ++p) {
        const f32x16 d = Panel::scale(w + p * stride, b, kGroup);
#pragma GCC unroll 12
        for (int a = 0; a < kRows; ++a) {
            const Block& block = *(const Block*)(x + a * row_bytes);
            const i32x16 sum = dots[a][p].template end<kSteps, !Panel::kHasMin>(block.start[kGroup]);
            acc[a][p] = fma(to_f32(sum), mul(d, set1(block.d)), acc[a][p]);
        }
    }
}

template <class Panel, int kRows, int kPanels>
static void block_tile(const char* x, int64_t row_bytes, const char* w, int64_t stride, int64_t num_blocks, int64_t r, int64_t n, Fetch& next,
                       const Finish& finish) {
    using Block = QuantBlock<typename Panel::Act>;
    Fetch ahead = next;
    finish.expect<kRows, kPanels>(r, n);
    f32x16 acc[kRows][kPanels];
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 12
        for (int p = 0; p < kPanels; ++p) acc[a][p] = zero();
    for (int64_t b = 0; b < num_blocks; ++b, x += sizeof(Block)) {
        ahead.some();
        block_group<Panel, 0>(w, stride, b, x, row_bytes, acc);
        if constexpr (Panel::kGroups == 2) block_group<Panel, 1>(w, stride, b, x, row_bytes, acc);
        if constexpr (Panel::kHasMin)
#pragma GCC unroll 12
            for (int p = 0; p < kPanels; ++p) {
                const f32x16 m = Panel::minimum(w + p * stride, b);
#pragma GCC unroll 12
                for (int a = 0; a < kRows; ++a) acc[a][p] = fma(m, set1(((const Block*)(x + a * row_bytes))->dsum), acc[a][p]);
            }
    }
    next = ahead;
#pragma GCC unroll 12
    for (int a = 0; a < kRows; ++a)
#pragma GCC unroll 12
        for (int p = 0; p < kPanels; ++p)
            if (n + 16 * p < finish.num_outputs) finish(acc[a][p], r + a, n + 16 * p);
}

// A tile of `rows` rows, at most kRows.
template <class Panel, int kPanels, int kRows>
PG_INLINE void tile_of(int64_t rows, const char* x, int64_t row_bytes, const char* w, int64_t stride, int64_t num_blocks, int64_t r, int64_t n,
                       Fetch& next, const Finish& finish) {
    if constexpr (kRows > 1)
        if (rows < kRows) return tile_of<Panel, kPanels, kRows - 1>(rows, x, row_bytes, w, stride, num_blocks, r, n, next, finish);
    block_tile<Panel, kRows, kPanels>(x, row_bytes, w, stride, num_blocks, r, n, next, finish);
}

// Panels are multiplied where they are stored, kPanels of them one after the other with a tile's rows, which stay in the first cache meanwhile.
template <class Format, class Act>
struct StoredRows {
    static constexpr int kPanels = kStoredPanels, kRows = kStoredRows;
    const Call& c;
    const char* x;
    const Finish& finish;
    const int64_t num_blocks, num_fetches, panel_bytes, row_bytes;

    StoredRows(const Call& call, const char* rows, const Finish& then)
        : c(call), x(rows), finish(then), num_blocks(c.t[1].cols / 32), num_fetches(num_blocks * kPanels),
          panel_bytes(bytes_of_panel<Format>(c.t[1].cols)), row_bytes(quant_row_bytes<Act>(c.t[1].cols)) {}

    template <int kCount>
    void run(int64_t panel, int64_t r, int64_t end, Fetch& next) const {
        const char* w = static_cast<const char*>(c.t[1].data) + panel * panel_bytes;
        for (EvenTiles tile{r, end, kRows}; tile.next();)
            for (int64_t p = 0; p < kCount; ++p)
                tile_of<Stored<Format, Act>, 1, kRows>(tile.rows, x + tile.row * row_bytes, row_bytes, w + p * panel_bytes, panel_bytes, num_blocks,
                                                       tile.row, (panel + p) * 16, next, finish);
    }
};

// Many rows: a group of kBlockPanels panels is unpacked into `room`, then multiplied with rows [r, r + rows). Group `next` is
// likely to be wanted after it.
template <class Format, class Act>
static void unpacked_panels(const char* x, const pg_tensor& weight, int64_t r, int64_t rows, int64_t group, int64_t next_group, char* room,
                            const Finish& finish) {
    using Panel = UnpackedOf<Format, Act>;
    const int64_t k = weight.cols, bytes = bytes_of_panel<Format>(k), panels = (weight.rows + 15) / 16, stride = k / 32 * Panel::kBytes;
    const int64_t row_bytes = quant_row_bytes<Act>(k), first = group * kBlockPanels, after = next_group * kBlockPanels;
    const char* w = static_cast<const char*>(weight.data);
    for (int64_t p = first; p < first + kBlockPanels && p < panels; ++p) unpack_panel<Format, Act>(w + p * bytes, k, room + (p - first) * stride);
    const int64_t ahead = panels <= after ? 0 : (panels - after < kBlockPanels ? panels - after : kBlockPanels) * bytes;
    Fetch next = fetch(w + after * bytes, ahead, k / 32 * ((rows + kBlockRows - 1) / kBlockRows), false);
    for (EvenTiles tile{r, r + rows, kBlockRows}; tile.next();)
        tile_of<Panel, kBlockPanels, kBlockRows>(tile.rows, x + tile.row * row_bytes, row_bytes, room, stride, k / 32, tile.row, first * 16, next, finish);
}
