// Attention over the paged cache, for prefill and decode alike.
//
// The query heads that share a key-value head, of all queries of a sequence, are rows: row m is query m / G, head
// m % G of the group of G. A task is some consecutive rows of one (sequence, key-value head); they share each read of
// K and V. Where a sequence's rows are one task a head (decoding), a task takes several heads together, tile by tile: they lie side
// by side in a page, and memory is faster in longer runs. Keys are walked in tiles of 64 at absolute positions 0, 64, 128, ... with
// an online softmax:
//
//     s = (scale * q).k - m, -inf where not seen;   p = exp(s)
//     l = l + p  (16 lanes);                        o = o + p v,  key after key
//
// where m is the largest score of the first tile, raised only when a score is above it by more than 8: until then the numbers
// are as good, and raising costs a pass over o. The sum that makes a score begins with -m, unless scores are capped. At absolute
// positions 1024, 2048, ... a row starts afresh, and its parts are merged from the first to the last, whoever computed them: so a long
// context can be shared out among threads.
//
// A row's numbers depend on its own keys only: a key it does not see adds p = 0, a tile it does not see leaves m, l
// and o as they are, bit for bit. So prefill, chunks and decode agree. Keys outside the rows' range are not read, for
// they may belong to nobody.
//
// The keys and values of the rows themselves may come along, with queries and keys not turned yet (pagoda/kernels/fuse.py joins the
// steps). Then keys are turned and written in a phase before, or, where each sequence is one tile of rows (decoding), by the task of
// their sequence and head when it comes to their tile: no other task reads them. Queries are turned where they are scaled.
#pragma once

struct AttentionSizes {
    static constexpr int64_t kRows = 48 / kTileRows * kTileRows, kKeys = 64, kGroups = kKeys / 16, kPart = 1024, kBundleBytes = 64 << 10;
    // A row's state is [o: dim, padded][l: 16][m, is_used, unused: 16].
    static int64_t state_floats(int64_t dim) { return round_up(dim, 16) + 32; }
    static int64_t thread_bytes(int64_t dim) {
        const int64_t rows = kRows * (round_up(4 * dim + 16, 64) + 2 * state_floats(dim) * 4 + 32);
        return round_up(rows + 2 * kTileRows * kKeys * 4 + kKeys * 4, 64);
    }
    // Rows of parts that other threads merge: as many as one sequence of the longest context has, or more on many threads.
    static int64_t shared_rows(const Call& c, int num_threads) {
        return 64 * num_threads + c.t[0].cols / c.i[2] * (c.t[3].cols * c.i[0] / kPart + 1);
    }
};

// Who does what: computed alike by every thread. A sequence of few rows and a long context is one task per (part, head), whose
// states are merged in a second phase; any other is one task per (head, tile of rows).
struct AttentionWork : AttentionSizes {
    struct Sequence {
        int64_t index, start, queries, keys, per, tiles, first_part, parts, shared_row, before, tasks;   // parts 0: not shared out
        int64_t bundle;   // key-value heads of a task
    };

    const Call& c;
    const int64_t heads, group, window;
    const int32_t *starts, *lens;
    int64_t per, share, room, most_heads, turn = -1, before = 0, used = 0;
    Sequence at{};

    AttentionWork(const Call& call, int num_threads)
        : c(call), heads(call.i[1]), group(call.t[0].cols / (call.i[1] * call.i[2])), window(call.i[4]),
          starts(static_cast<const int32_t*>(call.t[4].data)), lens(static_cast<const int32_t*>(call.t[5].data)),
          room(num_threads > 1 ? shared_rows(call, num_threads) : 0) {
        const int64_t most = group < kRows ? kRows / group * group : kRows, least = group < kRows ? group : kRows;
        const int64_t rows = c.rows * group * heads / (num_threads * 4) / group * group;
        per = rows < least ? least : rows > most ? most : rows;
        // Heads lie side by side in memory, which is read faster in longer runs, as long as there are tasks enough for all threads.
        most_heads = kBundleBytes / (kKeys * 2 * c.i[2] * (c.t[1].dtype == PG_F32 ? 4 : c.t[1].dtype == PG_BF16 ? 2 : 1));
        most_heads = most_heads < 1 ? 1 : most_heads > heads ? heads : most_heads;
        while (most_heads > 1 && c.t[5].rows * ((heads + most_heads - 1) / most_heads) < 8 * num_threads) --most_heads;
        int64_t total = 0;
        for (int64_t s = 0; s < c.t[5].rows; ++s)
            if (is_right(s)) total += ((starts[s + 1] - starts[s]) * group + per - 1) / per * heads * lens[s];
        share = total / (num_threads * 4);
    }

    bool is_right(int64_t s) const {
        return starts[s] >= 0 && starts[s] <= starts[s + 1] && starts[s + 1] <= c.t[0].rows && lens[s] >= starts[s + 1] - starts[s];
    }

    // Task n of the sequence: which head, and which part or tile of rows, the last first.
    int64_t tiles() const { return at.parts ? at.parts : at.tiles; }
    int64_t head_of(int64_t n) const { return n / tiles() * at.bundle; }
    int64_t heads_of(int64_t n) const { return heads - head_of(n) < at.bundle ? heads - head_of(n) : at.bundle; }
    int64_t tile_of(int64_t n) const { return tiles() - 1 - n % tiles(); }

    // Where the keys of a task lie: from `key` to before `end`, which is 0 for no task.
    struct Place {
        int64_t sequence = 0, head = 0, heads = 0, key = 0, end = 0;
    };
    Place place(int64_t n) const {
        const int64_t first_row = at.parts ? 0 : tile_of(n) * at.per, to = at.keys - at.queries + first_row / group + 1;
        const int64_t low = window > 0 && to > window ? to - window : 0, part = at.parts ? (at.first_part + tile_of(n)) * kPart : 0;
        return {at.index, head_of(n), heads_of(n), part > low ? part : low, at.keys};
    }

    // Moves to the next sequence; false after the last one. Those of several tiles come first, so that what is left to the end is small.
    bool advance() {
        before += at.tasks;
        at = {};
        const int64_t num_sequences = c.t[5].rows;
        int64_t index;
        do {
            if (++turn >= 2 * num_sequences) return false;
            index = turn < num_sequences ? turn : turn - num_sequences;
        } while ((is_right(index) && (starts[index + 1] - starts[index]) * group > per) != (turn < num_sequences));
        at.index = index;
        at.before = before;
        if (!is_right(index)) {
            report(c, "attention: a sequence has fewer keys than queries, or queries outside the batch");
            return true;
        }
        at.start = starts[index];
        at.queries = starts[index + 1] - starts[index];
        at.keys = lens[index];
        at.per = per;
        at.tiles = (at.queries * group + per - 1) / per;
        if (at.tiles > 1 && group < kRows) {   // of like size: a few tasks end together then
            at.per = (at.queries + at.tiles - 1) / at.tiles * group;
            at.tiles = (at.queries * group + at.per - 1) / at.per;
        }
        const int64_t fit = at.tiles == 1 && at.queries > 0 ? kRows / (at.queries * group) : 1;
        at.bundle = fit < 1 ? 1 : fit < most_heads ? fit : most_heads;
        at.tasks = at.tiles * ((heads + at.bundle - 1) / at.bundle);
        const int64_t low = at.keys - at.queries + 1 - window, parts = (at.keys - 1) / kPart + 1;
        const int64_t first = window > 0 && low > 0 ? low / kPart : 0, rows = at.queries * group * heads * (parts - first);
        if (at.tiles == 1 && parts - first > 1 && at.keys > share && used + rows <= room) {
            at.first_part = first;
            at.parts = parts - first;
            at.bundle = 1;
            at.tasks = at.parts * heads;
            at.shared_row = used;
            used += rows;
        }
        return true;
    }

    // Whether each row is written where its own sequence reads it, by the one task that does: the positions of all rows belong to
    // sequences of one tile, and slots are what block tables say.
    bool writes_own() {
        int64_t rows = 0;
        while (advance()) {
            if (!is_right(at.index) || at.start != rows || at.tiles > 1 || at.parts) return false;
            const int32_t* table = row<int32_t>(c.t[3], at.index);
            for (int64_t p = at.keys - at.queries; p < at.keys; ++p, ++rows) {
                const int64_t page = p / c.i[0];
                if (page >= c.t[3].cols || index_at(c.t[9], rows) != table[page] * c.i[0] + p % c.i[0]) return false;
            }
        }
        return rows == c.rows;
    }

    // Moves to the sequence of a task. False when there is no such task.
    bool find(int64_t task) {
        const int64_t end = 2 * c.t[5].rows;
        if (task < at.before || turn < 0 || turn >= end) {
            turn = -1;
            before = used = 0;
            at = {};
        }
        while (turn < 0 || (turn < end && task >= before + at.tasks))
            if (!advance()) return false;
        return turn < end;
    }
};

template <class Kind>
struct Attention : AttentionSizes {
    using Element = typename Kind::Element;
    using Weight = typename Kind::Weight;
    static constexpr int kPair = Kind::kPair, kWeightRow = Kind::kWeightRow;
    static constexpr float kSlack = 8.0f;

    const Call& c;
    const Cache cache;
    const int64_t dim, wide, group, window, q_bytes, state_size;
    const float scale, cap;
    float* const shared;   // states that another task merges
    const Turning turning;          // of a call that brings new tokens
    const NewTokens fresh;
    const bool is_joined;
    const int tid;
    bool writes = false;   // each task its own

    // Scratch of one thread.
    char* q;            // [kRows] queries, as the kind keeps them
    float *now, *total; // [kRows] states: of this part, and of the parts before it
    float* s;           // [kTileRows][64] scores
    Weight* w;          // [kTileRows][kWeightRow] weights
    float* scales;      // [64] of the tile's values
    int64_t *from, *to; // [kRows] keys a row sees
    float *start, *limit, *none;   // [kRows] -m; the s above which m is raised; zeros
    const char* keys[kGroups];   // of the current tile
    const Element* values[kGroups];
    // What is asked for line by line while a tile is worked on: of the tile after it, here or in the task that is likely next. Pages
    // lie anywhere, so the hardware cannot guess them.
    bool fetch = false;
    int64_t keys_end = 0;         // of this task
    AttentionWork::Place after;   // of the next one
    AttentionWork::Place next;    // the tile after this one, of all heads of its task
    int64_t next_bytes[kGroups];  // where its groups lie, of its first head
    int64_t next_groups, next_group, next_side, next_head;   // how many groups it has, and what comes next: page by page, keys first
    const char *next_keys[kGroups], *next_values[kGroups];

    Attention(const Call& call, int thread, int num_threads)
        : c(call), cache(Cache::of(&call.t[1], &call.t[2], call.i)), dim(cache.dim), wide(round_up(dim, 16)),
          group(call.t[0].cols / (cache.heads * dim)), window(call.i[4]), q_bytes(round_up(Kind::query_bytes(dim), 64)),
          state_size(state_floats(dim)), scale(float(call.f[0]) * Kind::kUnit), cap(float(call.f[1]) * Kind::kUnit),
          shared((float*)(call.scratch + num_threads * thread_bytes(dim))), turning{call.t[10], call.t[11]},
          fresh(call, cache, call.t[7], call.t[8], call.t[9], &turning), is_joined(call.t[7].data), tid(thread) {
        char* p = call.scratch + thread * thread_bytes(dim);
        now = (float*)p;
        total = now + kRows * state_size;
        s = total + kRows * state_size;
        w = (Weight*)(s + kTileRows * kKeys);
        scales = (float*)(w + kTileRows * kWeightRow);
        from = (int64_t*)(scales + kKeys);
        to = from + kRows;
        start = (float*)(to + kRows);
        limit = start + kRows;
        none = limit + kRows;
        memset(none, 0, kRows * 4);
        q = (char*)(none + round_up(kRows, 16));
    }

    void run(int phase, int num_threads) {
        if (is_joined) {
            writes = AttentionWork(c, num_threads).writes_own();
            if (!writes && phase-- == 0) return fresh.write_all(num_threads);
        }
        AttentionWork work(c, num_threads);
        if (phase == 0) return run_tasks(work, num_threads);
        int64_t next, end;
        take(c, INT64_MAX / 2, 1, &next, &end);
        for (int64_t count = 0; work.advance();)   // tasks are the heads of sequences that were shared out
            for (int64_t head = 0; work.at.parts && head < cache.heads; ++head, ++count)
                if (next == count) {
                    merge_shared(work.at, head);
                    take(c, INT64_MAX / 2, 1, &next, &end);
                }
    }

    // Tasks of like size are shared out in halves, so that this thread knows what comes next; of a prompt's the smallest come last.
    void run_tasks(AttentionWork& work, int num_threads) {
        bool is_even = true;
        while (work.advance()) is_even = is_even && work.at.tiles <= 1;
        const int64_t count = work.before;
        const Halves halves = Halves::of(c, count, 1, tid, num_threads);
        AttentionWork ahead = work;
        Halves::Range now, likely;
        int64_t end;
        while (is_even ? halves.take(&now, &likely) : take(c, count, 1, &now.begin, &end)) {
            const int64_t guess = !is_even ? upcoming(c) + num_threads - 1 : likely.begin < likely.end ? likely.begin : INT64_MAX;
            after = ahead.find(guess) ? ahead.place(guess - ahead.at.before) : AttentionWork::Place{};
            work.find(now.begin);
            task(work, now.begin - work.at.before);
        }
    }

    const float* query_of(int64_t head, int64_t start, int64_t r) const {
        return row<float>(c.t[0], start + r / group) + (head * group + r % group) * dim;
    }
    float* out_of(int64_t head, int64_t start, int64_t r) const {
        return row<float>(c.t[6], start + r / group) + (head * group + r % group) * dim;
    }

    // The state of a row in a part: [parts][heads][rows].
    float* shared_state(const AttentionWork::Sequence& at, int64_t head, int64_t part, int64_t r) const {
        return shared + (at.shared_row + (part * cache.heads + head) * at.queries * group + r) * state_size;
    }

    void task(const AttentionWork& work, int64_t n) {
        const AttentionWork::Sequence& at = work.at;
        const int64_t head = work.head_of(n), num_heads = work.heads_of(n), tile = work.tile_of(n), first = at.parts ? 0 : tile * at.per;
        const int64_t left = at.queries * group - first;
        const int per_head = int(left < at.per ? left : at.per), rows = int(num_heads) * per_head;
        int64_t low = INT64_MAX, high = 0;
        for (int a = 0; a < rows; ++a) {
            const int64_t r = first + a % per_head, own = head + a / per_head;
            float turned[512];
            const float* x = query_of(own, at.start, r);
            if (is_joined && turning.turn(c, at.start + r / group, x, turned, dim, dim)) x = turned;
            Kind::load_query(x, scale, dim, q + a * q_bytes);
            if (a + 6 < rows)
                for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(query_of(own, at.start, r + 6) + d);
            to[a] = at.keys - at.queries + r / group + 1;
            from[a] = window > 0 && to[a] > window ? to[a] - window : 0;
            low = from[a] < low ? from[a] : low;
            high = to[a] > high ? to[a] : high;
        }
        const int64_t first_part = at.parts ? at.first_part + tile : low / kPart, last_part = at.parts ? first_part : (high - 1) / kPart;
        for (int a = 0; first_part < last_part && a < rows; ++a) clear(total + a * state_size);
        for (int64_t part = first_part; part <= last_part; ++part) {
            const int64_t begin = part * kPart > low ? part * kPart : low, stop = (part + 1) * kPart < high ? (part + 1) * kPart : high;
            keys_end = part < last_part ? high : stop;
            for (int a = 0; a < rows; ++a) {
                clear(now + a * state_size);
                start[a] = 0.0f;
                limit[a] = -INFINITY;
            }
            if (!walk(at, head, num_heads, per_head, begin, stop)) return;
            for (int a = 0; a < rows; ++a) {
                float* state = now + a * state_size;
                state[wide + 17] = from[a] < stop && to[a] > begin ? 1.0f : 0.0f;
                if (at.parts) memcpy(shared_state(at, head, tile, a), state, size_t(state_size) * 4);
                else if (first_part < last_part) merge(total + a * state_size, state);
            }
        }
        if (at.parts == 0)
            for (int a = 0; a < rows; ++a)
                finish((first_part < last_part ? total : now) + a * state_size, out_of(head + a / per_head, at.start, first + a % per_head));
    }

    void merge_shared(const AttentionWork::Sequence& at, int64_t head) {
        for (int64_t r = 0; r < at.queries * group; ++r) {
            clear(total);
            for (int64_t part = 0; part < at.parts; ++part) merge(total, shared_state(at, head, part, r));
            finish(total, out_of(head, at.start, r));
        }
    }

    void clear(float* state) const {
        memset(state, 0, size_t(state_size) * 4);
    }

    // total = total and part, taken together. A part that the row does not see changes nothing; the first one is copied.
    void merge(float* total, const float* part) const {
        if (part[wide + 17] == 0.0f) return;
        if (total[wide + 17] == 0.0f) {
            memcpy(total, part, size_t(state_size) * 4);
            return;
        }
        const float a = total[wide + 16], b = part[wide + 16], top = a > b ? a : b;
        const f32x16 keep = Kind::shrink(set1(a - top)), join = Kind::shrink(set1(b - top));
        for (int64_t d = 0; d < wide + 16; d += 16) store(total + d, fma(load(total + d), keep, mul(load(part + d), join)));
        total[wide + 16] = top;
    }

    void finish(const float* state, float* y) const {
        const float sum = reduce_add(load(state + wide));
        const f32x16 inverse = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
        int64_t d = 0;
        for (; d + 16 <= dim; d += 16) store(y + d, mul(load(state + d), inverse));
        if (d < dim) store_n(y + d, mul(load(state + d), inverse), dim - d);
    }

    // Keys [low, high) for all rows, tile by tile and in each head by head.
    bool walk(const AttentionWork::Sequence& at, int64_t head, int64_t num_heads, int per_head, int64_t low, int64_t high) {
        for (int64_t base = low / kKeys * kKeys; base < high; base += kKeys) {
            const int64_t begin = low > base ? low - base : 0, stop = high - base < kKeys ? high - base : kKeys;
            const int first = int(begin / 16), last = int((stop + 15) / 16);
            if (base + kKeys < keys_end) find_next({at.index, head, num_heads, base + kKeys, keys_end});
            else find_next(after);
            // Its own keys are written late: by now their pages have come.
            if (writes && base <= at.keys - at.queries && base + kKeys > at.keys - at.queries)
                fresh.write(at.start, at.start + at.queries, head, head + num_heads);
            for (int h = 0; h < num_heads; ++h) {
                if (!find_pages(at.index, head + h, base, first, last)) return false;
                choose_next(at.tiles > 1 || (first == 0 && last == kGroups));
                if (at.tiles == 1)   // one page after the other: read side by side they would make the hardware fetch what nobody wants
                    for (int g = first; g < last; ++g)
                        for (int64_t b = 0; b < cache.group_bytes; b += 64) __builtin_prefetch(keys[g] + b, 0, 3);
                if constexpr (Kind::kIsInteger) take_scales(first, last);
                tile(h * per_head, (h + 1) * per_head, base, begin, stop);
            }
        }
        return true;
    }

    // The pages of groups [first, last) of the tile at `base`, as byte offsets. False when one is outside the cache.
    bool find_groups(int64_t sequence, int64_t head, int64_t base, int first, int last, int64_t* bytes) const {
        const int32_t* table = row<int32_t>(c.t[3], sequence);
        int64_t at = (base + 16 * first) / cache.block_size, offset = base + 16 * first - at * cache.block_size;
        for (int g = first; g < last; ++g, offset += 16) {
            if (offset == cache.block_size) offset = 0, ++at;
            const int64_t block = at < c.t[3].cols ? table[at] : -1;
            if (block < 0 || block >= cache.blocks) return false;
            bytes[g] = cache.group_at(block, head, offset);
        }
        return true;
    }

    bool find_pages(int64_t sequence, int64_t head, int64_t base, int first, int last) {
        int64_t bytes[kGroups];
        if (!find_groups(sequence, head, base, first, last, bytes)) {
            report(c, "attention: a block table entry is outside the cache");
            return false;
        }
        for (int g = 0; g < int(kGroups); ++g) {   // a group without keys stands for one that has some
            const int64_t byte = bytes[g < first ? first : g < last ? g : last - 1];
            keys[g] = static_cast<const char*>(cache.k->data) + byte;
            values[g] = (const Element*)(static_cast<const char*>(cache.v->data) + byte);
        }
        return true;
    }

    void find_next(const AttentionWork::Place& place) {
        next = place;
        const int64_t base = place.key / kKeys * kKeys, left = place.end - base;
        next_groups = left <= 0 ? 0 : left >= kKeys ? kGroups : (left + 15) / 16;
        next_group = next_side = next_head = 0;
        if (!find_groups(place.sequence, place.head, base, 0, int(next_groups), next_bytes)) next_groups = 0;   // reported when it is reached
    }

    // Where the next group of what comes next lies.
    const char* one_next() {
        const int64_t byte = next_bytes[next_group] + next_head * (cache.block_size / 16) * cache.group_bytes;
        const char* at = static_cast<const char*>(next_side ? cache.v->data : cache.k->data) + byte;
        if (++next_head == next.heads) {
            next_head = 0;
            if (++next_side == 2) next_side = 0, ++next_group;
        }
        return at;
    }

    // As many groups as are multiplied meanwhile; beside a tile that is not whole they are asked for at once, unless other tasks have
    // just read them.
    void choose_next(bool is_whole) {
        fetch = is_whole && next_group < next_groups;
        if (fetch && next.heads == 1) {   // keys of all its pages, then values
            for (int64_t g = 0; g < kGroups; ++g) {
                const int64_t byte = next_bytes[g < next_groups ? g : next_groups - 1];
                next_keys[g] = static_cast<const char*>(cache.k->data) + byte;
                next_values[g] = static_cast<const char*>(cache.v->data) + byte;
            }
            return;
        }
        for (int64_t n = 0; n < 2 * kGroups && next_group < next_groups; ++n) {
            const char* at = one_next();
            if (!is_whole)
                for (int64_t b = 0; b < cache.group_bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
            else if (n < kGroups)
                for (int64_t g = n; g < kGroups; ++g) next_keys[g] = next_values[g] = at;
            else
                for (int64_t g = n - kGroups; g < kGroups; ++g) next_values[g] = at;
        }
    }

    // The scales of the tile's values.
    void take_scales(int first, int last) {
        for (int g = first; g < last; ++g) {
            if (fetch) {
                __builtin_prefetch(next_keys[g] + 16 * dim, 0, 2);
                __builtin_prefetch(next_values[g] + 16 * dim, 0, 2);
            }
            store(scales + 16 * g, load((const float*)(values[g] + 16 * dim)));
        }
    }

    // Rows in blocks that fit the registers. The scores of a block are computed before the block before it is weighed, so that
    // neither waits for the exponentials between them.
    void tile(int row, int rows, int64_t base, int64_t begin, int64_t stop) {
        const int first = int(begin / 16), last = int((stop + 15) / 16);
        scores_of<kTileRows>(row, rows, first, last, fetch);
        for (int a = row; a < rows; a += kTileRows) {
            soften_block(a, rows - a < kTileRows ? rows - a : kTileRows, base, first, last);
            if (a + kTileRows < rows) scores_of<kTileRows>(a + kTileRows, rows, first, last, false);
            weigh_of<kTileRows>(a, rows, begin, stop, 0, a == row && fetch);
            if constexpr (Kind::kDigits == 2)
                if (base == 0) weigh_of<kTileRows>(a, rows, begin, stop, kWeightRow / 2, false);
        }
    }

    // The block of at most kR rows that begins at row a. The first one asks for what comes next.
    template <int kR>
    void scores_of(int a, int rows, int first, int last, bool asks) {
        if constexpr (kR > 1)
            if (rows - a < kR) return scores_of<kR - 1>(a, rows, first, last, asks);
        int g = first;
        for (; g + kTilePanels <= last; g += kTilePanels)
            if (asks) scores<kR, kTilePanels, true>(a, g);
            else scores<kR, kTilePanels, false>(a, g);
        if constexpr (kTilePanels > 1)
            for (; g < last; ++g) {
                if (asks) scores<kR, 1, true>(a, g);
                else scores<kR, 1, false>(a, g);
            }
    }

    // The weights begin at `digit` of their rows.
    template <int kR>
    void weigh_of(int a, int rows, int64_t begin, int64_t stop, int digit, bool asks) {
        if constexpr (kR > 1)
            if (rows - a < kR) return weigh_of<kR - 1>(a, rows, begin, stop, digit, asks);
        int64_t d = 0;
        for (; d + 16 * kTilePanels <= dim; d += 16 * kTilePanels)
            if (asks) weigh<kR, kTilePanels, true>(a, begin, stop, w + digit, d, 16);
            else weigh<kR, kTilePanels, false>(a, begin, stop, w + digit, d, 16);
        if constexpr (kTilePanels > 1)
            for (; d + 16 <= dim; d += 16) weigh<kR, 1, false>(a, begin, stop, w + digit, d, 16);
        if (d < dim) weigh<kR, 1, false>(a, begin, stop, w + digit, d, dim - d);
    }

    template <int kR, int kP, bool kFetch>
    PG_MEMBER void scores(int a, int g) {
        constexpr int kS = Kind::kScoreRows < kR ? Kind::kScoreRows : kR, kLeft = kR % kS;
        const char* x = q + a * q_bytes;
        const float* base = cap > 0 ? none : start + a;
        float* y = s + 16 * g;
        Kind::template scores<kS, kP, kFetch>(x, q_bytes, keys + g, next_keys + g, dim, base, y, kKeys);
        for (int b = kS; b + kS <= kR; b += kS)
            Kind::template scores<kS, kP, false>(x + b * q_bytes, q_bytes, keys + g, next_keys + g, dim, base + b, y + b * kKeys, kKeys);
        if constexpr (kLeft > 0)
            Kind::template scores<kLeft, kP, false>(x + (kR - kLeft) * q_bytes, q_bytes, keys + g, next_keys + g, dim, base + kR - kLeft,
                                                    y + (kR - kLeft) * kKeys, kKeys);
    }

    void soften_block(int a, int rows, int64_t base, int first, int last) {
        if (first == 0 && last == kGroups && cap == 0.0f && sees_all(a, base, 0, kGroups) && sees_all(a + rows - 1, base, 0, kGroups)) {
            for (int b = 0; b < rows; ++b) soften<true, false>(a + b, b, base, 0, kGroups);
            return;
        }
        for (int b = 0; b < rows; ++b)
            if (sees_all(a + b, base, first, last)) soften<false, false>(a + b, b, base, first, last);
            else soften<false, true>(a + b, b, base, first, last);
    }
    bool sees_all(int a, int64_t base, int first, int last) const { return from[a] <= base + 16 * first && to[a] >= base + 16 * last; }

    // Scores of row a, row b of the block, in groups [first, last) -> weights; adds to its sum, and seldom raises its maximum.
    template <bool kWhole, bool kMasked>
    PG_MEMBER void soften(int a, int b, int64_t base, int first, int last) {
        float *at = s + b * kKeys, *state = now + a * state_size;
        const int64_t lo = from[a] - base, hi = to[a] - base;
        f32x16 v[kGroups], most = set1(-INFINITY);
#pragma GCC unroll 4
        for (int g = 0; g < int(kGroups); ++g) {
            if (!kWhole && (g < first || g >= last)) {
                v[g] = set1(-INFINITY);
                continue;
            }
            if constexpr (Kind::kIsInteger) v[g] = Kind::score(at + 16 * g, q + a * q_bytes, keys[g], dim, !kWhole && cap > 0 ? 0.0f : start[a]);
            else v[g] = load(at + 16 * g);
            if constexpr (!kWhole)
                if (cap > 0) v[g] = fma(set1(cap), vtanh(div(v[g], set1(cap))), set1(start[a]));
            if constexpr (kMasked) v[g] = keep_lanes(v[g], lo - 16 * g, hi - 16 * g, set1(-INFINITY));
            most = max(v[g], most);
        }
        if (any_above(most, limit[a])) {
            const f32x16 raised = set1(raise(a, reduce_max(most)));
#pragma GCC unroll 4
            for (int g = 0; g < int(kGroups); ++g) v[g] = sub(v[g], raised);
        }
#pragma GCC unroll 4
        for (int g = 0; g < int(kGroups); ++g) {
            if (!kWhole && (g < first || g >= last)) {
                v[g] = zero();
                continue;
            }
            v[g] = Kind::power(v[g]);
            if constexpr (kMasked) v[g] = keep_lanes(v[g], lo - 16 * g, hi - 16 * g, zero());
        }
        store(state + wide, Kind::template weights<!kWhole>(load(state + wide), v, w + b * kWeightRow, scales, lo, hi, base == 0 ? Kind::kDigits : 1));
    }

    // Lets the maximum of a row be higher by `by`; returns by how much it is.
    __attribute__((noinline)) float raise(int a, float by) {
        float* state = now + a * state_size;
        const float before = state[wide + 16], top = before + by, delta = top - before;
        const f32x16 shrink = Kind::shrink(set1(-delta));
        if (limit[a] > 0)   // else nothing is there yet
            for (int64_t d = 0; d < wide + 16; d += 16) store(state + d, mul(load(state + d), shrink));
        state[wide + 16] = top;
        start[a] = -top;
        limit[a] = kSlack;
        return delta;
    }

    // Part kPart of the products with values at `v`, of n columns in the last 16.
    template <int kPart, int kR, int kC>
    PG_MEMBER void weigh_step(const Element* v, int64_t n, const Weight* weights, f32x16 (&acc)[kR][kC]) {
        decltype(Kind::load_values(v, n)) column[kC];
#pragma GCC unroll 4
        for (int p = 0; p < kC; ++p) column[p] = Kind::load_values(v + 16 * kPair * p, kC > 1 ? 16 : n);
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) acc[b][p] = Kind::template weigh<kPart>(acc[b][p], column[p], weights + b * kWeightRow);
    }

    // o += p v for keys [begin, stop) of the tile and columns d .. of rows a ..; n < 16 columns are left of the last 16.
    template <int kR, int kC, bool kFetch>
    PG_MEMBER void weigh(int a, int64_t begin, int64_t stop, const Weight* weights, int64_t d, int64_t n) {
        if constexpr (Kind::kIsInteger) weigh_integers<kR, kC, kFetch>(a, begin, stop, weights, d, n);
        else weigh_floats<kR, kC, kFetch>(a, begin, stop, d, n);
    }

    // What of the pairs after key j is asked for beside column d.
    template <int kC>
    PG_MEMBER void ask_values(int64_t j, int64_t d) {
        const char* next = next_values[j / 16] + (j % 16 * dim + d * kPair) * int64_t(sizeof(Element));
#pragma GCC unroll 4
        for (int p = 0; p < kC; ++p) __builtin_prefetch(next + 64 * p, 0, 2);
    }

    template <int S, int kR, int kC>
    PG_INLINE void weigh_bytes(const u8x64 (&column)[kC], const Weight* weights, i32x16 (&sums)[kR][kC]) {
        if constexpr (S < Kind::kSteps) {
#pragma GCC unroll 8
            for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
                for (int p = 0; p < kC; ++p) sums[b][p] = Kind::template weigh<S>(sums[b][p], column[p], weights + b * kWeightRow);
            weigh_bytes<S + 1>(column, weights, sums);
        }
    }

    // The last of four keys may belong to nobody yet: their weights are 0.
    template <int kR, int kC, bool kFetch>
    void weigh_integers(int a, int64_t begin, int64_t stop, const Weight* weights, int64_t d, int64_t n) {
        i32x16 sums[kR][kC];
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) sums[b][p] = iset1(0);
        for (int64_t j = begin / kPair * kPair; j < stop; j += kPair) {
            const Element* v = values[j / 16] + j % 16 * dim + d * kPair;
            if constexpr (kFetch) ask_values<kC>(j, d);
            u8x64 column[kC];
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) column[p] = Kind::load_values(v + 16 * kPair * p, kC > 1 ? 16 : n);
            weigh_bytes<0>(column, weights + j, sums);
        }
        float* o = now + a * state_size + d;
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b, o += state_size) {
            const f32x16 step = set1(Kind::step_of_weights(weights + b * kWeightRow));
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) store(o + 16 * p, fma(to_f32(in_register(sums[b][p])), step, load(o + 16 * p)));
        }
    }

    template <int kR, int kC, bool kFetch>
    void weigh_floats(int a, int64_t begin, int64_t stop, int64_t d, int64_t n) {
        float* o = now + a * state_size + d;
        f32x16 acc[kR][kC];
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) acc[b][p] = load(o + b * state_size + 16 * p);
        int64_t j = begin / kPair * kPair;
        for (; j + kPair <= stop; j += kPair) {
            const Element* v = values[j / 16] + j % 16 * dim + d * kPair;
            if constexpr (kFetch) ask_values<kC>(j, d);
            weigh_step<0>(v, n, w + j, acc);
            if constexpr (Kind::kParts == 2) weigh_step<1>(again(v), n, w + j, acc);
        }
        if constexpr (kPair == 2)
            if (j < stop) {   // the other key of the last pair belongs to nobody yet: shifted out, whatever it holds
                const Element* v = values[j / 16] + j % 16 * dim + d * kPair;
                u8x64 alone[kC];
#pragma GCC unroll 4
                for (int p = 0; p < kC; ++p) alone[p] = shift_left<16>(Kind::load_values(v + 32 * p, n));
#pragma GCC unroll 8
                for (int b = 0; b < kR; ++b) {
                    const Weight pair[2] = {0, w[b * kWeightRow + j]};
#pragma GCC unroll 4
                    for (int p = 0; p < kC; ++p) acc[b][p] = Kind::template weigh<Kind::kParts - 1>(acc[b][p], alone[p], pair);
                }
            }
#pragma GCC unroll 8
        for (int b = 0; b < kR; ++b)
#pragma GCC unroll 4
            for (int p = 0; p < kC; ++p) store(o + b * state_size + 16 * p, acc[b][p]);
    }
};

struct attention_op : AttentionSizes {
    static int phases(const Call& c, int num_threads) {
        const int before = c.t[7].data && !AttentionWork(c, num_threads).writes_own();
        AttentionWork work(c, num_threads);
        while (work.advance())
            if (work.at.parts) return before + 2;
        return before + 1;
    }
    static int64_t scratch(const Call& c, int num_threads) {
        return num_threads * thread_bytes(c.i[2]) + shared_rows(c, num_threads) * state_floats(c.i[2]) * 4;
    }
    static void run(const Call& c, int phase, int tid, int num_threads) {
        if (c.t[1].dtype == PG_BF16) Attention<Bf16Cache>(c, tid, num_threads).run(phase, num_threads);
        else if (c.t[1].dtype == PG_U8) Attention<Int8Cache>(c, tid, num_threads).run(phase, num_threads);
        else Attention<F32Cache>(c, tid, num_threads).run(phase, num_threads);
    }
};
