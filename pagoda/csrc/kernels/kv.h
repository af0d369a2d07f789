// Writing keys and values to their pages; the layout is drawn in pagoda/kernels/kv.py.
#pragma once

struct Cache {
    const pg_tensor *k, *v;
    int64_t block_size, heads, dim, blocks;

    PG_INLINE Cache of(const pg_tensor* k, const pg_tensor* v, const int64_t* i) { return {k, v, i[0], i[1], i[2], i[3]}; }
    // The first element of a page's row of values, were rows apart; groups of 16 keys start where their first row would,
    // and so do pairs of values.
    int64_t row_at(int64_t block, int64_t head, int64_t offset) const { return ((block * heads + head) * block_size + offset) * dim; }
};

struct kv_write_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        const Cache cache = Cache::of(&c.t[2], &c.t[3], c.i);
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads, 4), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                int64_t slot = index_at(c.t[4], r);
                if (slot < 0) continue;
                if (slot >= cache.blocks * cache.block_size) {
                    report(c, "kv_write: a slot is outside the cache");
                    continue;
                }
                for (int64_t h = 0; h < cache.heads; ++h) {
                    const float *k = row<float>(c.t[0], r) + h * cache.dim, *v = row<float>(c.t[1], r) + h * cache.dim;
                    int64_t offset = slot % cache.block_size, lane = offset % 16;
                    int64_t key_at = cache.row_at(slot / cache.block_size, h, offset - lane);
                    int64_t value_at = cache.row_at(slot / cache.block_size, h, offset);
                    if (cache.k->dtype == PG_BF16) {
                        uint16_t* to = static_cast<uint16_t*>(cache.k->data) + key_at + 2 * lane;
                        for (int64_t d = 0; d < cache.dim; ++d) to[32 * (d / 2) + d % 2] = to_bf16(k[d]);
                        uint16_t* pair = static_cast<uint16_t*>(cache.v->data) + value_at - lane % 2 * cache.dim + lane % 2;
                        for (int64_t d = 0; d < cache.dim; ++d) pair[2 * d] = to_bf16(v[d]);
                    } else {
                        float* to = static_cast<float*>(cache.k->data) + key_at + lane;
                        for (int64_t d = 0; d < cache.dim; ++d) to[16 * d] = k[d];
                        memcpy(static_cast<float*>(cache.v->data) + value_at, v, size_t(cache.dim) * 4);
                    }
                }
            }
    }
};
