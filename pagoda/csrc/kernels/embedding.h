// Rows of a packed table, and rows of a matrix.
#pragma once

struct embedding_op : SimpleOp {
    static int64_t room_bytes(const pg_tensor& table) { return table.dtype == PG_W_I8 ? i8_room_bytes(table.cols) : 0; }
    static int64_t scratch(const Call& c, int num_threads) { return num_threads * room_bytes(c.t[1]); }

    static void run(const Call& c, int, int tid, int num_threads) {
        const pg_tensor& table = c.t[1];
        float* room = (float*)(c.scratch + tid * room_bytes(table));
        const float scale = float(c.f[0]);
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                int64_t id = index_at(c.t[0], r);
                if (id < 0 || id >= table.rows) {
                    report(c, "embedding: an id is outside the table");
                    continue;
                }
                float* y = row<float>(c.t[2], r);
                read_row(table, id, y, room);
                if (scale != 1.0f)
                    for (int64_t k = 0; k < table.cols; ++k) y[k] *= scale;
            }
    }

    static void read_row(const pg_tensor& table, int64_t id, float* y, float* room) {
        const int64_t k = table.cols, panel = id / 16, lane = id % 16;
        const char* w = static_cast<const char*>(table.data);
        switch (table.dtype) {
            case PG_W_F32: {
                const float* p = (const float*)w + panel * k * 16 + lane;
                for (int64_t i = 0; i < k; ++i) y[i] = p[16 * i];
                return;
            }
            case PG_W_BF16: {
                const uint16_t* p = (const uint16_t*)w + panel * ((k + 1) / 2) * 32 + 2 * lane;
                for (int64_t i = 0; i < k; ++i) y[i] = from_bf16(p[32 * (i / 2) + i % 2]);
                return;
            }
            case PG_W_I8: {
                const char* p = w + panel * i8_panel_bytes(k);
                const float d = ((const float*)p)[lane];
                for (int64_t i = 0; i < k; ++i) room[i] = d * float(((const uint8_t*)p)[64 + 64 * (i / 4) + 4 * lane + i % 4] - 128);
                memcpy(y, rotate(room, room + k, k, i8_cosines(table)), size_t(k) * 4);   // the turn is its own inverse, but for a factor in d
                return;
            }
        }
#define PG_READ(Format, Act) read_blocks<Format>(w + panel * bytes_of_panel<Format>(k), lane, k, y)
        PG_BLOCK_FORMAT(table.dtype, PG_READ)
#undef PG_READ
    }

    // Unpacks a unit of the panel at a time and takes one output's values.
    template <class Format>
    static void read_blocks(const char* w, int64_t lane, int64_t k, float* y) {
        using Panel = UnpackedOf<Format, Bytes>;
        alignas(64) char unit[Format::kUnit / 32 * Panel::kBytes];
        for (int64_t at = 0; at < k; at += Format::kUnit, w += Format::kBytes) {
            unpack_panel<Format, Bytes>(w, Format::kUnit, unit);
            for (const char* block = unit; block < unit + sizeof unit; block += Panel::kBytes, y += 32) {
                const float* scales = (const float*)block + lane;
                const float m = Format::kHasMin ? scales[16 * Format::kGroups] : 0.0f;
                const uint8_t* q = (const uint8_t*)block + Panel::kHead + 4 * lane;
                for (int i = 0; i < 32; ++i)
                    y[i] = scales[16 * (i * Format::kGroups / 32)] * float(q[64 * (i / 4) + i % 4] - Format::kZero) + m;
            }
        }
    }
};

struct gather_rows_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r) {
                int64_t from = index_at(c.t[1], r);
                if (from < 0 || from >= c.t[0].rows) report(c, "gather_rows: an index is outside the matrix");
                else memcpy(row<float>(c.t[2], r), row<float>(c.t[0], from), size_t(c.t[2].cols) * 4);
            }
    }
};
