// Writing keys and values to their pages; the layout is drawn in pagoda/kernels/kv.py.
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

// The largest |x|; +inf when there is an infinity or a NaN. `x` is followed by zeros up to the next multiple of 32.
PG_INLINE float largest_of(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i += 32) {
        const int32_t here = largest_magnitude(load(x + i), load(x + i + 16));
        most = here > most ? here : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value < INFINITY ? value : INFINITY;
}
PG_INLINE bool is_divisor(float most) { return most >= 1e-30f && most < INFINITY; }

// Eight bits and a scale: what is not finite makes the scale NaN; what is too small to divide by becomes zero, of scale 1.
PG_INLINE float to_int8(const float* x, int64_t n, int8_t* y) {
    float padded[512 + 32] = {};
    memcpy(padded, x, size_t(n) * 4);
    const float most = largest_of(padded, n), inverse = is_divisor(most) ? 127.0f / most : 0.0f;
    for (int64_t i = 0; i < n; i += 16) store_i8(y + i, inverse > 0 ? round_i32(mul(load(padded + i), set1(inverse))) : iset1(0));
    return most < INFINITY ? (inverse > 0 ? most / 127.0f : 1.0f) : NAN;
}

struct kv_write_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        const Cache cache = Cache::of(&c.t[2], &c.t[3], c.i);
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads, 4), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                const int64_t slot = index_at(c.t[4], r);
                if (slot < 0) continue;
                if (slot >= cache.blocks * cache.block_size) {
                    report(c, "kv_write: a slot is outside the cache");
                    continue;
                }
                const int64_t offset = slot % cache.block_size;
                for (int64_t h = 0; h < cache.heads; ++h) {
                    const float *k = row<float>(c.t[0], r) + h * cache.dim, *v = row<float>(c.t[1], r) + h * cache.dim;
                    const int64_t at = cache.group_at(slot / cache.block_size, h, offset);
                    char *keys = static_cast<char*>(cache.k->data) + at, *values = static_cast<char*>(cache.v->data) + at;
                    if (cache.k->dtype == PG_U8) write_int8(k, v, cache.dim, offset % 16, keys, values);
                    else if (cache.k->dtype == PG_BF16) write_bf16(k, v, cache.dim, offset % 16, (uint16_t*)keys, (uint16_t*)values);
                    else write_f32(k, v, cache.dim, offset % 16, (float*)keys, (float*)values);
                }
            }
    }

    static void write_f32(const float* k, const float* v, int64_t dim, int64_t lane, float* keys, float* values) {
        for (int64_t d = 0; d < dim; ++d) keys[16 * d + lane] = k[d];
        memcpy(values + lane * dim, v, size_t(dim) * 4);
    }

    static void write_bf16(const float* k, const float* v, int64_t dim, int64_t lane, uint16_t* keys, uint16_t* values) {
        for (int64_t d = 0; d < dim; ++d) keys[32 * (d / 2) + 2 * lane + d % 2] = to_bf16(k[d]);
        uint16_t* pairs = values + lane / 2 * 2 * dim + lane % 2;
        for (int64_t d = 0; d < dim; ++d) pairs[2 * d] = to_bf16(v[d]);
    }

    static void write_int8(const float* k, const float* v, int64_t dim, int64_t lane, char* keys, char* values) {
        int8_t bytes[512 + 16];
        const float key_scale = to_int8(k, dim, bytes);
        for (int64_t d = 0; d < dim; ++d) keys[64 * (d / 4) + 4 * lane + d % 4] = char(uint8_t(bytes[d] + 128));
        const float value_scale = to_int8(v, dim, bytes);
        char* pairs = values + lane / 2 * 2 * dim + lane % 2;
        for (int64_t d = 0; d < dim; ++d) pairs[2 * d] = char(bytes[d]);
        memcpy(keys + 16 * dim + 4 * lane, &key_scale, 4);
        memcpy(values + 16 * dim + 4 * lane, &value_scale, 4);
    }
};
