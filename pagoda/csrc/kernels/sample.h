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

struct sample_op {
    static int phases(const Call&, int) { return 1; }
    static int64_t row_bytes(const Call& c) { return round_up(c.t[0].cols * 24, 64); }   // p, candidates, heap of maxima
    static int64_t scratch(const Call& c, int num_threads) { return row_bytes(c) * num_threads; }

    static void run(const Call& c, int, int tid, int) {
        int64_t r, end;
        while (take(c, c.rows, 1, &r, &end)) {
            const float temperature = static_cast<const float*>(c.t[1].data)[r];
            const float* x = row<float>(c.t[0], r);
            bool is_bad;
            const float top = row_top(x, c.t[0].cols, &is_bad);
            int32_t id = -1;
            if (is_bad || !(top > -INFINITY)) {
                // nothing can be drawn from it
            } else if (!(temperature > 0)) {
                id = row_find(x, c.t[0].cols, top);
            } else {
                Row work{x, c.t[0].cols, top, (double*)(c.scratch + tid * row_bytes(c)), nullptr, nullptr};
                work.candidates = (Candidate*)(work.p + work.n);
                work.maxima = work.candidates + work.n;
                id = work.draw(temperature, static_cast<const int32_t*>(c.t[2].data)[r], double(static_cast<const float*>(c.t[3].data)[r]),
                               double(static_cast<const float*>(c.t[4].data)[r]),
                               philox_uniform(static_cast<const uint64_t*>(c.t[5].data)[r], uint64_t(static_cast<const int64_t*>(c.t[6].data)[r])));
            }
            static_cast<int32_t*>(c.t[7].data)[r] = id;
        }
    }

    struct Row {
        const float* x;
        int64_t n;
        float top;
        double* p;              // [n] exp((x - top) / temperature), 0 where dropped by min_p
        Candidate *candidates, *maxima;

        int32_t draw(double temperature, int64_t top_k, double top_p, double min_p, double u) {
            for (int64_t i = 0; i < n; ++i) p[i] = exp_double((double(x[i]) - double(top)) / temperature);
            if (min_p > 0)
                for (int64_t i = 0; i < n; ++i) p[i] = p[i] >= min_p ? p[i] : 0.0;
            Candidate last{-INFINITY, INT32_MAX};
            if ((top_k > 0 && top_k < n) || top_p < 1) last = cut(top_k > 0 && top_k < n ? top_k : n, top_p);
            double total = 0;
            int32_t fallback = 0;
            for (int64_t i = 0; i < n; ++i) {
                if (before(last, Candidate{x[i], int32_t(i)})) p[i] = 0;
                total += p[i];
            }
            const double target = u * total;
            double sum = 0;
            for (int64_t i = 0; i < n; ++i) {
                if (!(p[i] > 0)) continue;
                sum += p[i];
                fallback = int32_t(i);
                if (sum > target) break;
            }
            return fallback;
        }

        // The last token kept by top_k, then top_p.
        Candidate cut(int64_t top_k, double top_p) {
            double all = 0;
            for (int64_t i = 0; i < n; ++i) all += p[i];
            // Tokens this small weigh less than 1 - top_p together, so the head that reaches top_p has none of them.
            double least = top_k < n || top_p >= 1 ? 0.0 : all * (1 - top_p) / double(n) * 0.999;
            float threshold = top_k < n ? at_least(top_k) : -INFINITY;
            int64_t count = 0;
            for (int64_t i = 0; i < n; ++i)
                if (x[i] >= threshold && p[i] > least) candidates[count++] = {x[i], int32_t(i)};
            make_heap(candidates, count);
            if (top_k >= n) return head(count, top_p * all);
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
};
