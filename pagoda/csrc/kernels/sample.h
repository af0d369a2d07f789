// The sampler: see the docstring of pagoda/kernels/ops.py: sample, and the reference it must agree with.
//
// Tokens are ordered by (logit descending, id ascending). min_p, top_k and top_p each keep a head of that order, so what
// is kept is everything not after a last token, and the vocabulary is never sorted: candidates above a threshold that
// cannot cut too much go into a heap, from which only the head is popped.
#pragma once

struct Candidate {
    float logit;
    int32_t id;
};

PG_INLINE bool before(Candidate a, Candidate b) { return a.logit > b.logit || (a.logit == b.logit && a.id < b.id); }

static void sift_down(Candidate* heap, int64_t n, int64_t i) {
    Candidate x = heap[i];
    for (int64_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && before(heap[child + 1], heap[child])) ++child;
        if (!before(heap[child], x)) break;
        heap[i] = heap[child];
    }
    heap[i] = x;
}

static void make_heap(Candidate* heap, int64_t n) {
    for (int64_t i = n / 2 - 1; i >= 0; --i) sift_down(heap, n, i);
}

static Candidate pop(Candidate* heap, int64_t* n) {
    Candidate top = heap[0];
    heap[0] = heap[--*n];
    if (*n > 0) sift_down(heap, *n, 0);
    return top;
}

static double philox_uniform(uint64_t seed, uint64_t position) {
    uint32_t key[2] = {uint32_t(seed), uint32_t(seed >> 32)};
    uint32_t x[4] = {uint32_t(position), uint32_t(position >> 32), 0, 0};
    for (int round = 0; round < 10; ++round) {
        uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
        uint32_t y[4] = {uint32_t(b >> 32) ^ x[1] ^ key[0], uint32_t(b), uint32_t(a >> 32) ^ x[3] ^ key[1], uint32_t(a)};
        memcpy(x, y, sizeof x);
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return (double(x[0] >> 5) * 67108864.0 + double(x[1] >> 6)) / 9007199254740992.0;
}

// One row to draw from. `width` is what top_k is held against: the vocabulary, of which x may be a part. Probabilities are
// added up by blocks of 64, eight sums side by side in each: a chain of additions, each waiting for the last, costs more than exp.
struct Draw {
    static constexpr int64_t kBlock = 64;
    const float* x;
    int64_t n, width, num_blocks;
    float top;              // the largest of x
    double* p;              // [num_blocks * 64] exp((x - top) / temperature), 0 where dropped
    double* sums;           // [num_blocks] of p
    Candidate *candidates, *maxima;   // [n] each

    // Memory for n numbers.
    static int64_t bytes(int64_t n) {
        const int64_t blocks = (n + kBlock - 1) / kBlock;
        return round_up((blocks * (kBlock + 1) + 2 * n) * 8, 64);
    }
    Draw(const float* x, int64_t n, int64_t width, float top, char* memory)
        : x(x), n(n), width(width), num_blocks((n + kBlock - 1) / kBlock), top(top), p((double*)memory), sums(p + num_blocks * kBlock),
          candidates((Candidate*)(sums + num_blocks)), maxima(candidates + n) {}

    int32_t draw(double temperature, int64_t top_k, double top_p, double min_p, double u) {
        double total = weigh(1 / temperature, min_p);
        if ((top_k > 0 && top_k < width) || top_p < 1) {
            const Candidate last = cut(top_k > 0 && top_k < width ? top_k : width, top_p, total);
            for (int64_t i = 0; i < n; ++i)
                if (before(last, Candidate{x[i], int32_t(i)})) p[i] = 0;
            total = add_up();
        }
        return find(u * total);
    }

    // p and its sums.
    double weigh(double scale, double min_p) {
        double total = 0;
        for (int64_t i = n; i < num_blocks * kBlock; ++i) p[i] = 0;
        for (int64_t b = 0; b < num_blocks; ++b) {
            const int64_t begin = b * kBlock, count = n - begin < kBlock ? n - begin : kBlock;
            for (int64_t i = begin; i < begin + count; ++i) {
                const double weight = exp_double((double(x[i]) - double(top)) * scale);
                p[i] = weight >= min_p ? weight : 0.0;
            }
            total += sums[b] = sum_of(p + begin);
        }
        return total;
    }

    static double sum_of(const double* q) {
        double t[8] = {};
        for (int64_t i = 0; i < kBlock; i += 8)
            for (int k = 0; k < 8; ++k) t[k] += q[i + k];
        return ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]));
    }

    double add_up() {
        double total = 0;
        for (int64_t b = 0; b < num_blocks; ++b) total += sums[b] = sum_of(p + b * kBlock);
        return total;
    }

    // The first place that takes the sum past `target`, which is less than the total: some block passes it, as this is the chain of
    // additions that made the total. If rounding lets no place of that block do so, it is the last one that has a probability.
    int32_t find(double target) const {
        double sum = 0;
        int64_t b = 0, chosen = 0;
        while (b + 1 < num_blocks && !(sum + sums[b] > target)) sum += sums[b++];
        for (int64_t i = b * kBlock; i < (b + 1) * kBlock; ++i) {
            if (!(p[i] > 0)) continue;
            chosen = i;
            sum += p[i];
            if (sum > target) break;
        }
        return int32_t(chosen);
    }

    // The last token kept by top_k, then top_p.
    Candidate cut(int64_t top_k, double top_p, double all) {
        // Tokens this small weigh less than 1 - top_p together, so the head that reaches top_p has none of them.
        double least = top_k < width || top_p >= 1 ? 0.0 : all * (1 - top_p) / double(n) * 0.999;
        float threshold = top_k < width ? at_least(top_k) : -INFINITY;
        int64_t count = 0;
        for (int64_t i = 0; i < n; ++i)
            if (x[i] >= threshold && p[i] > least) candidates[count++] = {x[i], int32_t(i)};
        make_heap(candidates, count);
        if (top_k >= width) return head(count, top_p * all);
        double sum = 0;
        int64_t left = count, kept = 0;
        while (left > 0 && kept < top_k) maxima[kept] = pop(candidates, &left), sum += p[maxima[kept++].id];
        if (top_p >= 1) return maxima[kept - 1];
        memcpy(candidates, maxima, size_t(kept) * sizeof(Candidate));   // in order already: a heap
        return head(kept, top_p * sum);
    }

    Candidate head(int64_t count, double mass) {
        double sum = 0;
        Candidate last{top, 0};
        while (count > 0) {
            last = pop(candidates, &count);
            sum += p[last.id];
            if (sum >= mass) break;
        }
        return last;
    }

    // A logit that at least k tokens reach: the k-th largest among maxima of 64 neighbours.
    float at_least(int64_t k) {
        const int64_t blocks = n / 64;
        if (k > blocks) return -INFINITY;
        for (int64_t b = 0; b < blocks; ++b) maxima[b] = {row_max(x + 64 * b, 64), int32_t(b)};
        int64_t left = blocks;
        make_heap(maxima, left);
        for (int64_t i = 1; i < k; ++i) pop(maxima, &left);
        return maxima[0].logit;
    }
};

// The place of the token drawn from x, -1 where nothing can be. t points at temperature, top_k, top_p, min_p, seed, position.
static int32_t draw_row(const pg_tensor* t, int64_t r, const float* x, int64_t n, int64_t width, float top, char* memory) {
    const float temperature = static_cast<const float*>(t[0].data)[r];
    if (!(top > -INFINITY)) return -1;
    if (!(temperature > 0)) return row_find(x, n, top);
    const double u = philox_uniform(static_cast<const uint64_t*>(t[4].data)[r], uint64_t(static_cast<const int64_t*>(t[5].data)[r]));
    return Draw(x, n, width, top, memory)
        .draw(temperature, static_cast<const int32_t*>(t[1].data)[r], double(static_cast<const float*>(t[2].data)[r]),
              double(static_cast<const float*>(t[3].data)[r]), u);
}

struct sample_op {
    static int phases(const Call&, int) { return 1; }
    static int64_t scratch(const Call& c, int num_threads) { return Draw::bytes(c.t[0].cols) * num_threads; }

    static void run(const Call& c, int, int tid, int) {
        const int64_t n = c.t[0].cols;
        int64_t r, end;
        while (take(c, c.rows, 1, &r, &end)) {
            int32_t id = -1;
            if (!(static_cast<const float*>(c.t[1].data)[r] < 0)) {
                const float* x = row<float>(c.t[0], r);
                bool is_bad;
                const float top = row_top(x, n, &is_bad);
                if (!is_bad) id = draw_row(c.t + 1, r, x, n, n, top, c.scratch + tid * Draw::bytes(n));
            }
            static_cast<int32_t*>(c.t[7].data)[r] = id;
        }
    }
};

// Only the allowed logits of a row are gathered, in order, and drawn from: what a mask forbids costs nothing behind that.
#if !defined(PG_HAS_COMPRESS)
PG_INLINE void store_chosen(float* to, f32x16 v, uint32_t lanes) {
    float t[16];
    store(t, v);
    for (int i = 0; i < 16; ++i) *to = t[i], to += lanes >> i & 1;   // what is not chosen is overwritten
}
#endif
#undef PG_HAS_COMPRESS

struct sample_masked_op {
    static int phases(const Call&, int) { return 1; }
    static int64_t row_bytes(const Call& c) { return Draw::bytes(c.t[0].cols) + round_up((c.t[0].cols + 16) * 4, 64); }
    static int64_t scratch(const Call& c, int num_threads) { return row_bytes(c) * num_threads; }

    static void run(const Call& c, int, int tid, int) {
        const int64_t n = c.t[0].cols;
        char* memory = c.scratch + tid * row_bytes(c);
        float* chosen = (float*)(memory + Draw::bytes(n));
        int64_t m, end;
        while (take(c, c.rows, 1, &m, &end)) {
            const int64_t r = index_at(c.t[1], m);
            int32_t id = -1;
            if (r < 0 || r >= c.t[0].rows) {
                report(c, "sample_masked: a row is outside the logits");
            } else {
                const uint8_t* mask = row<uint8_t>(c.t[2], m);
                const int64_t count = gather(row<float>(c.t[0], r), mask, n, chosen);
                if (count > 0) id = draw_row(c.t + 3, m, chosen, count, n, row_max(chosen, count), memory);
                if (id >= 0) id = place(mask, id);
            }
            static_cast<int32_t*>(c.t[9].data)[m] = id;
        }
    }

    // How many logits the mask allows, written to `to`, which has room for 16 more; -1 where the row holds NaN or +inf anywhere.
    static int64_t gather(const float* x, const uint8_t* mask, int64_t n, float* to) {
        const f32x16 infinite = set1(INFINITY), yes = set1(1.0f);
        f32x16 bad = zero();
        int64_t i = 0, count = 0;
        for (; i + 16 <= n; i += 16) {
            const f32x16 v = load(x + i);
            const uint32_t lanes = uint32_t(mask[i / 8]) | uint32_t(mask[i / 8 + 1]) << 8;
            bad = select_lt(v, infinite, bad, yes);   // a comparison with NaN is false
            store_chosen(to + count, v, lanes);
            count += __builtin_popcount(lanes);
        }
        bool is_bad = reduce_max(bad) > 0;
        for (; i < n; ++i) {
            is_bad |= !(x[i] < INFINITY);
            if (mask[i / 8] >> i % 8 & 1) to[count++] = x[i];
        }
        return is_bad ? -1 : count;
    }

    // The id of the token that is the k-th allowed one, from 0.
    static int32_t place(const uint8_t* mask, int32_t k) {
        int32_t id = 0;
        for (int32_t here; k >= (here = __builtin_popcount(*mask)); ++mask) k -= here, id += 8;
        for (uint32_t lanes = *mask;; lanes >>= 1, ++id)
            if (lanes & 1 && k-- == 0) return id;
    }
};
