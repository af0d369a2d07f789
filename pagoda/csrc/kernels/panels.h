// What products have in common whose panels are read where they are stored: fetching ahead, finishing a sum, sharing panels out.
#pragma once

// Memory to be fetched piece by piece while something else is computed: a few cache lines with each step of a tile,
// because more at once would wait for each other. What is read once only shall not push everything else out of the caches
// (an interpreter that finds its own memory gone loses 60 us a step).
struct Fetch {
    const char* at;
    int64_t left, lines;   // bytes still to fetch; cache lines a step
    bool once;
    PageLines* pages;      // and what else is asked for; may be none
    PG_MEMBER void some() {
        if (pages) pages->some();
        if (left <= 0) return;
        if (once)
            for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(at + 64 * n, 0, 0);
        else
            for (int64_t n = 0; n < lines; ++n) __builtin_prefetch(at + 64 * n, 0, 2);
        at += 64 * lines;
        left -= 64 * lines;
    }
};
PG_INLINE Fetch fetch(const char* at, int64_t bytes, int64_t steps, bool once) { return {at, bytes, steps > 0 ? bytes / 64 / steps + 1 : 0, once, nullptr}; }

// What happens to a finished accumulator: bias, residual, store. Of a gated product the first half of the outputs, the gate, is
// stored first and waits for the other half: y = activation(gate) * other.
struct Finish {
    const pg_tensor *bias, *residual, *out;
    int64_t num_outputs, gated;   // rows of the weight; 0, or 1 + which activation
    PG_MEMBER bool is_plain() const { return !gated && !bias->data && !residual->data; }
    // Asks for what a tile will write, before it is computed: its stores would wait for memory one after the other.
    template <int kRows, int kPanels>
    PG_MEMBER void expect(int64_t r, int64_t n) const {
        if (gated && n >= out->cols) n -= out->cols;
        const bool adds = residual->data && residual->data != out->data;
        for (int64_t a = r; a < r + kRows; ++a)
            for (int64_t at = n; at < n + 16 * kPanels; at += 16) {
                __builtin_prefetch(row<float>(*out, a) + at, 1, 3);
                if (adds) __builtin_prefetch(row<float>(*residual, a) + at, 0, 3);
            }
    }
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
        const bool order[2] = {is_odd, !is_odd};
        for (const bool second : order) {
            const uint64_t taken = uint64_t(ticket->fetch_add(second ? int64_t(1) << 32 : 1, std::memory_order_relaxed));
            const int64_t n = int64_t(second ? taken >> 32 : taken & 0xffffffff);
            *now = place(second, n);
            *likely = place(second, n + 1 + others);
            if (now->begin < now->end) return true;
        }
        return false;
    }
};

// Rows [row, end) in tiles of at most `most`, as even as can be: a tile of a row or two at the end would wait for its own chains of additions.
struct EvenTiles {
    int64_t row, end, most, rows = 0;   // `rows` of the tile that begins at `row`
    PG_MEMBER bool next() {
        row += rows;
        const int64_t tiles = (end - row + most - 1) / most;
        rows = tiles > 0 ? (end - row + tiles - 1) / tiles : 0;
        return rows > 0;
    }
};

// Parts that `rows` rows are multiplied in, so that the second cache keeps a part while all panels pass.
PG_INLINE int64_t row_parts(int64_t rows, int64_t row_bytes) {
    const int64_t least = 48, fit = kRowsBytes / row_bytes;
    return 1 + (rows - 1) / (fit > least ? fit : least);
}

// A weight as panels, and who multiplies which. `Rows` multiplies rows, of `row_bytes`: its `panel_bytes` says what a panel is,
// `num_fetches` how often a tile of kRows rows asks for what comes next, and run<kCount>(panel, r, end, next) multiplies rows [r, end)
// with kCount panels, at most kPanels, while `next` is fetched. What is shared out are the panels of the first part of the rows, then
// those of the second, and so on.
template <class Rows>
struct PanelProduct {
    static constexpr int kPanels = Rows::kPanels;

    const Call& c;
    const Rows& rows;
    const int64_t panels;   // of a gated product the gate's
    const int64_t parts, part_rows;
    const char* const weight;

    PanelProduct(const Call& call, const Rows& all)
        : c(call), rows(all), panels((c.t[4].cols + 15) / 16), parts(row_parts(c.rows, rows.row_bytes)), part_rows((c.rows + parts - 1) / parts),
          weight(static_cast<const char*>(c.t[1].data)) {}

    Halves halves(int tid, int num_threads) const {
        const int64_t most = panels / ((c.rows == 1 ? 4 : 32) * num_threads) / kPanels * kPanels, least = panels / (2 * num_threads);
        return Halves::of(c, parts * panels, most > 0 ? most : least > kPanels ? kPanels : least > 1 ? least : 1, tid, num_threads);
    }

    // One row reads panels as fast as memory gives them; with more, the panels that come next are fetched meanwhile.
    Fetch ahead(int64_t panel, int64_t count, PageLines* lines) const {
        Fetch next = fetch(weight + panel * rows.panel_bytes, c.rows > 1 ? count * rows.panel_bytes : 0, steps(), c.rows <= Rows::kRows);
        next.pages = lines;
        return next;
    }
    // How often what comes next is asked for beside some panels.
    int64_t steps() const { return rows.num_fetches * ((part_rows + Rows::kRows - 1) / Rows::kRows); }
    // How many panels from place p on are multiplied together.
    int64_t count_of(int64_t p, int64_t end) const {
        const int64_t left = panels - p % panels, count = end - p < left ? end - p : left;
        return count < kPanels ? count : kPanels;
    }

    void run(int tid, int num_threads) const {
        const Halves shared = halves(tid, num_threads);
        Halves::Range now, likely;
        PagesAhead pages(c);
        PageLines* const lines = pages.is_empty() ? nullptr : &pages.lines;
        while (shared.take(&now, &likely))
            for (int64_t p = now.begin, count; p < now.end; p += count) {
                count = count_of(p, now.end);
                const int64_t panel = p % panels, r = p / panels * part_rows, end = c.rows - r < part_rows ? c.rows : r + part_rows;
                const int64_t after = p + count < now.end ? p + count : likely.begin;
                if (lines) pages.plan(p, p + count, parts * panels, c.i[1] ? 2 * steps() : steps());
                Fetch next = ahead(after % panels, count_of(after, p + count < now.end ? now.end : likely.end), lines);
                if (c.i[1]) {
                    Fetch factor = ahead(panel + panels, count, lines);
                    multiply<kPanels>(panel, r, end, count, factor);
                    multiply<kPanels>(panel + panels, r, end, count, next);
                } else {
                    multiply<kPanels>(panel, r, end, count, next);
                }
            }
    }

    template <int kCount>
    void multiply(int64_t panel, int64_t r, int64_t end, int64_t count, Fetch& next) const {
        if constexpr (kCount > 1)
            if (count < kCount) return multiply<kCount - 1>(panel, r, end, count, next);
        rows.template run<kCount>(panel, r, end, next);
    }
};

template <class Rows>
static void multiply_panels(const Call& c, const Rows& rows, int tid, int num_threads) {
    PanelProduct<Rows>(c, rows).run(tid, num_threads);
}
