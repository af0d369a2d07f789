// Attention over the paged cache, for prefill and decode alike.
//
// The query heads that share a key-value head, of all queries of a sequence, are rows: row m is query m / G, head
// m % G of the group of G. A task is some consecutive rows of one (sequence, key-value head); they share each read of
// K and V. Keys are walked in tiles of 64 at absolute positions 0, 64, 128, ... with an online softmax:
//
//     s = (scale * q).k, capped, -inf where not seen;   m' = max(m, s);   p = exp(s - m')
//     l = l * exp(m - m') + p  (16 lanes);              o = o * exp(m - m') + p v,  key after key
//
// With a bfloat16 cache q and p are bfloat16 too and both products are dot instructions: values lie in pairs of keys, as
// keys lie in pairs of d. The weights that are summed in l are the rounded ones.
// A row's numbers depend on its own keys only: a key it does not see adds p = 0, a tile it does not see leaves m, l
// and o as they are, bit for bit. So prefill, chunks and decode agree. Keys outside the rows' range are not read, for
// they may belong to nobody.
#pragma once

// exp(x) for x <= 0 to about 5e-5, an eighth of what rounding to bfloat16 then loses; 0 below -87.
PG_INLINE f32x16 vexp_short(f32x16 x) {
    const f32x16 magic = set1(12582912.0f);   // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    f32x16 shifted = fma(max(x, set1(-87.0f)), set1(1.44269504088896341f), magic);
    f32x16 r = fma(sub(shifted, magic), set1(-0.693147180559945f), max(x, set1(-87.0f)));
    f32x16 p = fma(fma(fma(fma(set1(0.0416666667f), r, set1(0.166666667f)), r, set1(0.5f)), r, set1(1.0f)), r, set1(1.0f));
    f32x16 y = unbits(iadd(bits(p), shift_left<23>(bits(shifted))));
    return select_lt(x, set1(-87.0f), zero(), y);
}

// What depends on the type of the cache. `w` are the weights of a row of queries, as the product with values reads them.
struct F32Cache {
    using Panels = F32Panels;
    using Element = float;
    static constexpr int kPair = 1;
    PG_INLINE f32x16 weights(f32x16 x, float* w) {
        f32x16 p = vexp(x);
        store(w, p);
        return p;
    }
    PG_INLINE f32x16 load_values(const float* v, int64_t n) { return load_some(v, n); }
    PG_INLINE f32x16 weigh(f32x16 acc, f32x16 v, const float* w) { return fma(set1(*w), v, acc); }
};

struct Bf16Cache {
    using Panels = Bf16Panels;
    using Element = uint16_t;
    static constexpr int kPair = 2;
    PG_INLINE f32x16 weights(f32x16 x, uint16_t* w) {
        store_bf16(w, vexp_short(x));
        return load_bf16(w);
    }
    PG_INLINE u8x64 load_values(const uint16_t* v, int64_t n) {   // [dim][2]
        if (n == 16) return load_bytes(v);
        uint16_t t[32] = {};
        for (int64_t i = 0; i < 2 * n; ++i) t[i] = v[i];
        return load_bytes(t);
    }
    PG_INLINE f32x16 weigh(f32x16 acc, u8x64 v, const uint16_t* w) { return dot_bf16(acc, v, w); }
};

template <class Kind>
struct Attention {
    using Panels = typename Kind::Panels;
    using Element = typename Kind::Element;
    static constexpr int kPair = Kind::kPair;
    static constexpr int kRows = 24, kKeys = 64, kGroups = kKeys / 16;

    const Call& c;
    const Cache cache;
    const int64_t group, window;
    const float scale, cap;

    // Scratch of one thread.
    Element *q, *w;                // [kRows][dim] scaled queries, [kRows][64] weights, in the cache's type
    float *o, *s, *l, *m;          // [kRows][dim], [kRows][64], [kRows][16], [kRows]
    int64_t *from, *to;            // [kRows] keys a row sees
    const char* keys[kGroups];     // of the current tile
    const Element* values[kGroups];
    // Of the tile after it, if there is one. It is asked for line by line while this one is worked on: pages lie anywhere,
    // so the hardware cannot guess them.
    bool fetch = false;
    const char* next_keys[kGroups];
    const Element* next_values[kGroups];

    static int64_t thread_bytes(int64_t dim) { return round_up(kRows * (dim * 8 + kKeys * 8 + 64 + 4 + 16), 64); }

    Attention(const Call& call, int tid)
        : c(call), cache(Cache::of(&call.t[1], &call.t[2], call.i)), group(call.t[0].cols / (cache.heads * cache.dim)),
          window(call.i[4]), scale(float(call.f[0])), cap(float(call.f[1])) {
        char* p = call.scratch + tid * thread_bytes(cache.dim);
        o = (float*)p;
        s = o + kRows * cache.dim;
        l = s + kRows * kKeys;
        from = (int64_t*)(l + kRows * 16);
        to = from + kRows;
        m = (float*)(to + kRows);
        w = (Element*)(m + kRows);
        q = w + kRows * kKeys;
    }

    void run(int num_threads) {
        const int32_t *starts = static_cast<const int32_t*>(c.t[4].data), *lens = static_cast<const int32_t*>(c.t[5].data);
        const int64_t all_rows = c.rows * group * cache.heads, share = all_rows / (num_threads * 4);
        const int64_t per = share < 1 ? 1 : share > kRows ? kRows : share;
        int64_t next, end, before = 0, sequence = 0;   // tickets only grow, so one walk over the sequences serves all
        while (take(c, INT64_MAX / 2, 1, &next, &end)) {
            for (; sequence < c.t[5].rows; ++sequence) {
                int64_t rows = (starts[sequence + 1] - starts[sequence]) * group;
                int64_t tasks = rows <= 0 ? 0 : cache.heads * ((rows + per - 1) / per);
                if (next < before + tasks) break;
                before += tasks;
            }
            if (sequence == c.t[5].rows) return;
            int64_t queries = starts[sequence + 1] - starts[sequence], tiles = (queries * group + per - 1) / per;
            int64_t head = (next - before) / tiles, first = (next - before) % tiles * per;
            if (lens[sequence] < queries || starts[sequence] < 0 || starts[sequence + 1] > c.t[0].rows) {
                report(c, "attention: a sequence has fewer keys than queries, or queries outside the batch");
                continue;
            }
            int64_t rows = queries * group - first < per ? queries * group - first : per;
            task(sequence, head, starts[sequence], lens[sequence] - queries, first, int(rows));
        }
    }

    float* out_of(int64_t head, int64_t start, int64_t r) const {
        return row<float>(c.t[6], start + r / group) + (head * group + r % group) * cache.dim;
    }

    void task(int64_t sequence, int64_t head, int64_t start, int64_t position, int64_t first, int rows) {
        const int64_t dim = cache.dim;
        int64_t low = INT64_MAX, high = 0;
        for (int a = 0; a < rows; ++a) {
            int64_t r = first + a;
            load_query(row<float>(c.t[0], start + r / group) + (head * group + r % group) * dim, q + a * dim);
            to[a] = position + r / group + 1;
            from[a] = window > 0 && to[a] > window ? to[a] - window : 0;
            low = from[a] < low ? from[a] : low;
            high = to[a] > high ? to[a] : high;
            m[a] = -1e30f;
            store(l + 16 * a, zero());
            memset(o + a * dim, 0, size_t(dim) * 4);
        }
        for (int64_t base = low / kKeys * kKeys; base < high; base += kKeys) {
            int64_t begin = low > base ? low - base : 0, stop = high - base < kKeys ? high - base : kKeys;
            if (!find_pages(sequence, head, base, begin / 16, (stop + 15) / 16)) return;
            find_next(sequence, head, base + kKeys, high);
            scores(rows, int(begin / 16), int((stop + 15) / 16));
            for (int a = 0; a < rows; ++a) soften(a, base, int(begin / 16), int((stop + 15) / 16));
            weigh(rows, begin, stop);
        }
        for (int a = 0; a < rows; ++a) {
            float total = reduce_add(load(l + 16 * a));
            f32x16 inverse = set1(total == 0.0f ? 0.0f : 1.0f / total);
            float* y = out_of(head, start, first + a);
            int64_t d = 0;
            for (; d + 16 <= dim; d += 16) store(y + d, mul(load(o + a * dim + d), inverse));
            if (d < dim) store_n(y + d, mul(load_n(o + a * dim + d, dim - d), inverse), dim - d);
        }
    }

    void load_query(const float* x, float* y) {
        for (int64_t d = 0; d < cache.dim; ++d) y[d] = scale * x[d];
    }
    void load_query(const float* x, uint16_t* y) {
        for (int64_t d = 0; d < cache.dim; ++d) y[d] = to_bf16(scale * x[d]);
    }

    bool find_pages(int64_t sequence, int64_t head, int64_t base, int64_t begin, int64_t end) {
        const int32_t* table = row<int32_t>(c.t[3], sequence);
        for (int64_t g = begin; g < end; ++g) {
            int64_t key = base + 16 * g, at = key / cache.block_size, block = at < c.t[3].cols ? table[at] : -1;
            if (block < 0 || block >= cache.blocks) {
                report(c, "attention: a block table entry is outside the cache");
                return false;
            }
            int64_t element = cache.row_at(block, head, key % cache.block_size);   // a group of 16: where pairs begin, too
            keys[g] = (const char*)(static_cast<const Element*>(cache.k->data) + element);
            values[g] = static_cast<const Element*>(cache.v->data) + element;
        }
        return true;
    }

    void find_next(int64_t sequence, int64_t head, int64_t base, int64_t high) {
        const int32_t* table = row<int32_t>(c.t[3], sequence);
        fetch = base < high;
        for (int64_t g = 0; fetch && g < kGroups; ++g) {
            const int64_t key = base + 16 * g < high ? base + 16 * g : base, block = table[key / cache.block_size];
            fetch = block >= 0 && block < cache.blocks;   // else reported when the tile is reached
            const int64_t element = cache.row_at(block, head, key % cache.block_size);
            next_keys[g] = (const char*)(static_cast<const Element*>(cache.k->data) + element);
            next_values[g] = static_cast<const Element*>(cache.v->data) + element;
        }
    }

    template <int kR, int kP, bool kFetch>
    void score_tile(int a, int g) {
        const int64_t steps = cache.dim / Panels::kStep, dim = cache.dim;
        const Element* x = q + a * dim;
        const char* k[kP];
        for (int p = 0; p < kP; ++p) k[p] = keys[g + p];
        f32x16 acc[kR][kP];
        for (int b = 0; b < kR; ++b)
            for (int p = 0; p < kP; ++p) acc[b][p] = zero();
        for (int64_t d = 0; d < steps; ++d) {
            if constexpr (kFetch)
                for (int p = 0; p < kP; ++p) __builtin_prefetch(next_keys[g + p] + 64 * d, 0, 2);
#pragma GCC unroll 8
            for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kP; ++p) acc[b][p] = Panels::step(acc[b][p], k[p] + 64 * d, x + b * dim + d * Panels::kStep);
        }
        for (int b = 0; b < kR; ++b)
            for (int p = 0; p < kP; ++p) store(s + (a + b) * kKeys + 16 * (g + p), acc[b][p]);
    }

    template <int kP, int kR = kTileRows>
    void score_rows(int a, int rows, int g) {
        if (a == 0 && rows >= kR && fetch) score_tile<kR, kP, true>(0, g), a = kR;
        for (; rows - a >= kR; a += kR) score_tile<kR, kP, false>(a, g);
        if constexpr (kR > 1)
            if (a < rows) score_rows<kP, kR - 1>(a, rows, g);
    }

    void scores(int rows, int begin, int end) {
        int g = begin;
        for (; g + kTilePanels <= end; g += kTilePanels) score_rows<kTilePanels>(0, rows, g);
        for (; g < end; ++g) score_rows<1>(0, rows, g);
    }

    // Scores of row a in groups [begin, end) -> weights; updates the row's maximum, sum and output.
    void soften(int a, int64_t base, int begin, int end) {
        f32x16 most = set1(-INFINITY);
        const bool sees_all = from[a] <= base + 16 * begin && to[a] >= base + 16 * end;
        for (int g = begin; g < end; ++g) {
            float* at = s + a * kKeys + 16 * g;
            f32x16 v = load(at);
            if (cap > 0) v = mul(set1(cap), vtanh(div(v, set1(cap))));
            if (!sees_all) v = keep_lanes(v, from[a] - base - 16 * g, to[a] - base - 16 * g, set1(-INFINITY));
            if (cap > 0 || !sees_all) store(at, v);
            most = max(v, most);
        }
        float top = reduce_max(most);
        if (top > m[a]) {
            f32x16 shrink = vexp(set1(m[a] - top));
            store(l + 16 * a, mul(load(l + 16 * a), shrink));
            float* y = o + a * cache.dim;
            int64_t d = 0;
            for (; d + 16 <= cache.dim; d += 16) store(y + d, mul(load(y + d), shrink));
            if (d < cache.dim) store_n(y + d, mul(load_n(y + d, cache.dim - d), shrink), cache.dim - d);
            m[a] = top;
        }
        f32x16 sum = load(l + 16 * a), peak = set1(m[a]);
        for (int g = begin; g < end; ++g) {
            const int at = a * kKeys + 16 * g;
            sum = add(sum, Kind::weights(sub(load(s + at), peak), w + at));
        }
        store(l + 16 * a, sum);
    }

    template <int kR, int kC, bool kFetch>
    void weigh_tile(int a, int64_t begin, int64_t end, int64_t d, int64_t n) {
        const int64_t dim = cache.dim;
        f32x16 acc[kR][kC];
        for (int b = 0; b < kR; ++b)
            for (int p = 0; p < kC; ++p) acc[b][p] = load_some(o + (a + b) * dim + d + 16 * p, n);
        int64_t j = begin / kPair * kPair;
        for (; j + kPair <= end; j += kPair) {
            const Element* v = values[j / 16] + j % 16 * dim + d * kPair;
            if constexpr (kFetch) {
                const char* next = (const char*)(next_values[j / 16] + j % 16 * dim + d * kPair);
                for (int p = 0; p < kC; ++p) __builtin_prefetch(next + 64 * p, 0, 2);
            }
            decltype(Kind::load_values(v, n)) column[kC];
            for (int p = 0; p < kC; ++p) column[p] = Kind::load_values(v + 16 * kPair * p, n);
#pragma GCC unroll 8
            for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kC; ++p) acc[b][p] = Kind::weigh(acc[b][p], column[p], w + (a + b) * kKeys + j);
        }
        if constexpr (kPair == 2)
            if (j < end) {   // the other key of the last pair belongs to nobody yet: shifted out, whatever it holds
                const Element* v = values[j / 16] + j % 16 * dim + d * kPair;
                for (int p = 0; p < kC; ++p) {
                    u8x64 alone = shift_left<16>(Kind::load_values(v + 32 * p, n));
                    for (int b = 0; b < kR; ++b) {
                        const uint16_t pair[2] = {0, w[(a + b) * kKeys + j]};
                        acc[b][p] = Kind::weigh(acc[b][p], alone, pair);
                    }
                }
            }
        for (int b = 0; b < kR; ++b)
            for (int p = 0; p < kC; ++p) {
                float* y = o + (a + b) * dim + d + 16 * p;
                if (n == 16) store(y, acc[b][p]);
                else store_n(y, acc[b][p], n);
            }
    }

    template <int kC, int kR = kTileRows>
    void weigh_rows(int a, int rows, int64_t begin, int64_t end, int64_t d, int64_t n) {
        if (a == 0 && rows >= kR && fetch) weigh_tile<kR, kC, true>(0, begin, end, d, n), a = kR;
        for (; rows - a >= kR; a += kR) weigh_tile<kR, kC, false>(a, begin, end, d, n);
        if constexpr (kR > 1)
            if (a < rows) weigh_rows<kC, kR - 1>(a, rows, begin, end, d, n);
    }

    // o += p v for keys [begin, end) of the tile.
    void weigh(int rows, int64_t begin, int64_t end) {
        int64_t d = 0;
        for (; d + 16 * kTilePanels <= cache.dim; d += 16 * kTilePanels) weigh_rows<kTilePanels>(0, rows, begin, end, d, 16);
        for (; d + 16 <= cache.dim; d += 16) weigh_rows<1>(0, rows, begin, end, d, 16);
        if (d < cache.dim) weigh_rows<1>(0, rows, begin, end, d, cache.dim - d);
    }
};

struct attention_op {
    static int phases(const Call&, int) { return 1; }
    static int64_t scratch(const Call& c, int num_threads) { return num_threads * Attention<F32Cache>::thread_bytes(c.i[2]); }
    static void run(const Call& c, int, int tid, int num_threads) {
        if (c.t[1].dtype == PG_BF16) Attention<Bf16Cache>(c, tid).run(num_threads);
        else Attention<F32Cache>(c, tid).run(num_threads);
    }
};
