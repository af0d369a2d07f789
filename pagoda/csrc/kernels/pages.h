// Pages of keys and values: where they lie, and asking for those that the next attention will read while a product computes.
//
// Attention over many sequences waits for memory, and a product of many rows hardly asks it for anything: one after the other they take
// as long as both. So each product between two attentions asks for its share of the second one's pages, in proportion to its weight, a
// few cache lines with each step of a tile. They wait in the second and last caches. Which sequences' come first is as attention takes them,
// so that a thread finds in its own cache what it asked for. With few rows memory is what a product waits for, and with a prompt's
// attention computes: neither asks.
#pragma once

struct Cache {
    const pg_tensor *k, *v;
    int64_t block_size, heads, dim, blocks, group_bytes;

    PG_INLINE Cache of(const pg_tensor* k, const pg_tensor* v, const int64_t* i) {
        const int64_t group = k->dtype == PG_U8 ? 16 * (i[2] + 4) : 16 * i[2] * (k->dtype == PG_BF16 ? 2 : 4);
        return {k, v, i[0], i[1], i[2], i[3], group};
    }
    // The first byte of the group of 16 tokens that a page's token `offset` is in; keys and values alike.
    int64_t group_at(int64_t block, int64_t head, int64_t offset) const {
        return ((block * heads + head) * (block_size / 16) + offset / 16) * group_bytes;
    }
};

// Some pages, to be asked for at `rate` bytes a step: as many each time, so that the processor can tell.
struct PageLines {
    static constexpr int kMost = 64;
    const char* from[kMost];
    const char *at, *end;
    int64_t bytes, rate;
    int count, next;
    void begin(int64_t steps) {
        at = end = nullptr;
        next = 0;
        rate = steps > 0 ? (count * (bytes / 64) / steps + 1) * 64 : 0;
        go_on();
    }
    PG_MEMBER void go_on() {
        if (next == count) return;
        at = from[next++];
        end = at + bytes;
    }
    PG_MEMBER void some() {
        for (const char* stop = end - at < rate ? end : at + rate; at < stop; at += 64) __builtin_prefetch(at, 0, 2);
        if (at == end) go_on();
    }
};

// What a product asks for: operands 6 .. 9 are planes, block table and lengths, i[2] .. i[5] the cache's sizes, i[6] the window, and its share is
// from i[7] to i[8], in 65,536ths. A unit is the keys or the values of a page.
struct PagesAhead {
    static constexpr int64_t kFewRows = 24, kManyRows = 256;
    const Call& c;
    const Cache cache;
    const int64_t page_bytes;
    int64_t first = 0, stop = 0;           // units of this product
    int64_t sequence = 0, before = 0;      // where the last plan ended: a sequence, and the units of those before it
    PageLines lines;

    explicit PagesAhead(const Call& call) : c(call), cache(Cache::of(&call.t[6], &call.t[7], call.i + 2)), page_bytes(cache.heads * (cache.block_size / 16) * cache.group_bytes) {
        if (!c.t[6].data || c.rows < kFewRows || c.rows > kManyRows) return;
        int64_t units = 0;
        for (int64_t s = 0; s < c.t[9].rows; ++s) units += units_of(s);
        const int64_t fit = last_level_bytes() / 4 * 3 / page_bytes;
        units = units < fit ? units : fit;
        first = units * c.i[7] >> 16;
        stop = units * c.i[8] >> 16;
    }
    bool is_empty() const { return first == stop; }

    int64_t length(int64_t s) const { return static_cast<const int32_t*>(c.t[9].data)[s]; }
    int64_t first_page(int64_t s) const { return c.i[6] > 0 && length(s) > c.i[6] ? (length(s) - c.i[6]) / cache.block_size : 0; }
    int64_t units_of(int64_t s) const {
        const int64_t pages = (length(s) + cache.block_size - 1) / cache.block_size;
        return 2 * ((pages < c.t[8].cols ? pages : c.t[8].cols) - first_page(s));
    }

    // What to ask for beside part [begin, end) of `count`, which takes so many steps.
    __attribute__((noinline)) void plan(int64_t begin, int64_t end, int64_t count, int64_t steps) {
        int64_t unit = first + (stop - first) * begin / count, last = first + (stop - first) * end / count;
        lines.count = 0;
        lines.bytes = page_bytes;
        if (unit < before) sequence = before = 0;
        for (; unit < last && lines.count < PageLines::kMost && sequence < c.t[9].rows; ) {
            const int64_t units = units_of(sequence);
            if (unit >= before + units) {
                before += units;
                ++sequence;
                continue;
            }
            const int64_t page = first_page(sequence) + (unit - before) / 2, block = row<int32_t>(c.t[8], sequence)[page];
            const pg_tensor& side = c.t[6 + (unit - before) % 2];
            if (block >= 0 && block < cache.blocks) lines.from[lines.count++] = static_cast<const char*>(side.data) + cache.group_at(block, 0, 0);
            ++unit;
        }
        lines.begin(steps);
    }
};
