// What products have in common whose panels are read where they are stored: fetching ahead, finishing a sum, sharing panels out.
#pragma once

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

// A weight as panels, and who multiplies which. `Rows` multiplies all rows: its `panel_bytes` and `steps` say what a panel is and in how many
// steps a tile of kRows rows walks it, and run<kCount>(panel, next) multiplies kCount panels, at most kPanels, while `next` is fetched.
template <class Rows>
struct PanelProduct {
    static constexpr int kPanels = Rows::kPanels;

    const Call& c;
    const Rows& rows;
    const int64_t panels;   // of a gated product the gate's
    const char* const weight;

    PanelProduct(const Call& call, const Rows& all)
        : c(call), rows(all), panels((c.t[4].cols + 15) / 16), weight(static_cast<const char*>(c.t[1].data)) {}

    Halves halves(int tid, int num_threads) const {
        const int64_t most = panels / ((c.rows == 1 ? 4 : 32) * num_threads) / kPanels * kPanels, least = panels / (2 * num_threads);
        return Halves::of(c, panels, most > 0 ? most : least > kPanels ? kPanels : least > 1 ? least : 1, tid, num_threads);
    }

    // One row reads panels as fast as memory gives them; with more, the panels that come next are fetched meanwhile.
    Fetch ahead(int64_t panel, int64_t end) const {
        const int64_t count = end - panel < kPanels ? end - panel : kPanels, tiles = (c.rows + Rows::kRows - 1) / Rows::kRows;
        return fetch(weight + panel * rows.panel_bytes, c.rows > 1 ? count * rows.panel_bytes : 0, rows.steps * tiles, tiles == 1);
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

    template <int kCount>
    void multiply(int64_t panel, int64_t count, Fetch& next) const {
        if constexpr (kCount > 1)
            if (count < kCount) return multiply<kCount - 1>(panel, count, next);
        rows.template run<kCount>(panel, next);
    }
};

template <class Rows>
static void multiply_panels(const Call& c, const Rows& rows, int tid, int num_threads) {
    PanelProduct<Rows>(c, rows).run(tid, num_threads);
}
