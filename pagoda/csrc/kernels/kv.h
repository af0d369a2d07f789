// Writing keys and values to their pages; the layout is drawn in pagoda/kernels/kv.py.
#pragma once

// The largest |x|; +inf when there is an infinity or a NaN.
PG_INLINE float largest_of(const float* x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i += 32) {
        const f32x16 a = n - i >= 16 ? load(x + i) : load_n(x + i, n - i);
        const f32x16 b = n - i >= 32 ? load(x + i + 16) : n - i > 16 ? load_n(x + i + 16, n - i - 16) : zero();
        const int32_t here = largest_magnitude(a, b);
        most = here > most ? here : most;
    }
    float value;
    memcpy(&value, &most, 4);
    return value < INFINITY ? value : INFINITY;
}
PG_INLINE bool is_divisor(float most) { return most >= 1e-30f && most < INFINITY; }

// Eight bits and a scale: what is not finite makes the scale NaN; what is too small to divide by becomes zero, of scale 1.
struct Rounding {
    float inverse, scale;

    PG_INLINE Rounding of(const float* x, int64_t n) {
        const float most = largest_of(x, n);
        if (is_divisor(most)) return {127.0f / most, most / 127.0f};
        return {0.0f, most < INFINITY ? 1.0f : NAN};
    }
    PG_MEMBER i32x16 round(const float* x, int64_t i, int64_t n) const {   // of x[i], x[i + 1], .. x[i + 15]
        if (!(inverse > 0)) return iset1(0);
        return round_i32(mul(n - i >= 16 ? load(x + i) : load_n(x + i, n - i), set1(inverse)));
    }
};

// One token of one head to its page. `second`, when given, is the token after it, the other one of its pair: the two are written at
// once. A token alone touches nothing of the other's, which another thread may be writing.
struct WriteF32 {
    static void write(const float* k, const float* v, const float* k2, const float* v2, int64_t dim, int64_t lane, char* keys, char* values) {
        one(k, v, dim, lane, (float*)keys, (float*)values);
        if (k2) one(k2, v2, dim, lane + 1, (float*)keys, (float*)values);
    }
    static void one(const float* k, const float* v, int64_t dim, int64_t lane, float* keys, float* values) {
        for (int64_t d = 0; d < dim; ++d) keys[16 * d + lane] = k[d];
        memcpy(values + lane * dim, v, size_t(dim) * 4);
    }
};

struct WriteBf16 {
    static void write(const float* k, const float* v, const float* k2, const float* v2, int64_t dim, int64_t lane, char* keys, char* values) {
        uint16_t row[512], row2[512];
        put_keys(k, row, dim, lane, keys);
        row_to_bf16(v, row, dim);
        if (k2) {
            uint32_t pairs[512];
            row_to_bf16(v2, row2, dim);
            for (int64_t d = 0; d < dim; ++d) pairs[d] = uint32_t(row[d]) | uint32_t(row2[d]) << 16;
            memcpy(values + lane * dim * 2, pairs, size_t(dim) * 4);
            put_keys(k2, row, dim, lane + 1, keys);
            return;
        }
        uint16_t* pairs = (uint16_t*)values + lane / 2 * 2 * dim + lane % 2;
        for (int64_t d = 0; d < dim; ++d) pairs[2 * d] = row[d];
    }
    PG_INLINE void put_keys(const float* k, uint16_t* row, int64_t dim, int64_t lane, char* keys) {
        row_to_bf16(k, row, dim);
        for (int64_t d = 0; d < dim; d += 2) memcpy(keys + 32 * d + 4 * lane, row + d, 4);
    }
};

struct WriteInt8 {
    static void write(const float* k, const float* v, const float* k2, const float* v2, int64_t dim, int64_t lane, char* keys, char* values) {
        put_keys(k, dim, lane, keys);
        const Rounding first = Rounding::of(v, dim);
        put_scale(values, dim, lane, first.scale);
        char* bytes = values + lane / 4 * 4 * dim + lane % 4;   // of each four tokens all that belongs to one d side by side
        if (!k2) {
            int8_t row[512 + 16];
            for (int64_t d = 0; d < dim; d += 16) store_i8(row + d, first.round(v, d, dim));
            for (int64_t d = 0; d < dim; ++d) bytes[4 * d] = char(row[d]);
            return;
        }
        put_keys(k2, dim, lane + 1, keys);
        const Rounding second = Rounding::of(v2, dim);
        put_scale(values, dim, lane + 1, second.scale);
        int16_t pairs[512 + 16];
        for (int64_t d = 0; d < dim; d += 16) store_i16(pairs + d, either(words<0, 255>(first.round(v, d, dim)), shift_left<8>(second.round(v2, d, dim))));
        for (int64_t d = 0; d < dim; ++d) memcpy(bytes + 4 * d, pairs + d, 2);
    }
    PG_INLINE void put_keys(const float* k, int64_t dim, int64_t lane, char* keys) {
        int8_t row[512 + 16];
        const Rounding by = Rounding::of(k, dim);
        put_scale(keys, dim, lane, by.scale);
        for (int64_t d = 0; d < dim; d += 16) store_i8(row + d, iadd(by.round(k, d, dim), iset1(128)));
        for (int64_t d = 0; d < dim; d += 4) memcpy(keys + 16 * d + 4 * lane, row + d, 4);
    }
    PG_INLINE void put_scale(char* group, int64_t dim, int64_t lane, float scale) { memcpy(group + 16 * dim + 4 * lane, &scale, 4); }
};

using WriteToken = void (*)(const float* k, const float* v, const float* k2, const float* v2, int64_t dim, int64_t lane, char* keys, char* values);
PG_INLINE WriteToken writer_of(int32_t dtype) {
    return dtype == PG_U8 ? WriteInt8::write : dtype == PG_BF16 ? WriteBf16::write : WriteF32::write;
}

// Rows of new keys and values, and where they go. With a table of angles keys are turned on the way.
struct NewTokens {
    const Call& c;
    const Cache cache;
    const pg_tensor &k, &v, &slots;
    const Turning* turning;
    const WriteToken write_token;

    NewTokens(const Call& call, const Cache& to, const pg_tensor& keys, const pg_tensor& values, const pg_tensor& where, const Turning* by)
        : c(call), cache(to), k(keys), v(values), slots(where), turning(by), write_token(writer_of(to.k->dtype)) {}

    // Heads [head, head_end) of rows [r, end).
    void write(int64_t r, int64_t end, int64_t head, int64_t head_end) const {
        for (; r < end; ++r) {
            const int64_t slot = index_at(slots, r), dim = cache.dim;
            if (slot < 0) continue;
            if (slot >= cache.blocks * cache.block_size) {
                report(c, "kv_write: a slot is outside the cache");
                continue;
            }
            const bool is_pair = slot % 2 == 0 && r + 1 < end && index_at(slots, r + 1) == slot + 1;
            const int64_t offset = slot % cache.block_size;
            for (int64_t h = head; h < head_end; ++h) {
                float first[512], second[512];
                const float *v1 = row<float>(v, r) + h * dim, *v2 = is_pair ? v1 + v.stride : nullptr;
                const float *k1 = key(r, h, first), *k2 = is_pair ? key(r + 1, h, second) : nullptr;
                const int64_t at = cache.group_at(slot / cache.block_size, h, offset);
                write_token(k1, v1, k2, v2, dim, offset % 16, static_cast<char*>(cache.k->data) + at, static_cast<char*>(cache.v->data) + at);
            }
            r += is_pair;
        }
    }

    const float* key(int64_t r, int64_t h, float* turned) const {
        const float* x = row<float>(k, r) + h * cache.dim;
        return turning && turning->turn(c, r, x, turned, cache.dim, cache.dim) ? turned : x;
    }

    // All heads of all rows, shared by all threads.
    void write_all(int num_threads) const {
        int64_t begin, end;
        while (take(c, k.rows, round_up(chunk_for(k.rows, num_threads, 4), 2), &begin, &end)) write(begin, end, 0, cache.heads);
    }
};

struct kv_write_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        NewTokens(c, Cache::of(&c.t[2], &c.t[3], c.i), c.t[0], c.t[1], c.t[4], nullptr).write_all(num_threads);
    }
};
