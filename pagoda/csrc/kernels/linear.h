// The linear op: turn the activations into what the format multiplies with, then share out panels of 16 outputs.
//
// The activations may first be normalised, and the outputs be the two halves of a gated activation (kernels/fuse.py). With few
// rows every thread prepares and converts all of them into scratch of its own, which is cheaper than meeting; with more, the
// rows are shared out and converted once, then the threads meet. Scratch is the converted rows, then for each thread a
// prepared row, then room for the panels it has unpacked.
#pragma once

struct linear_op {
    static constexpr int64_t kFewRows = 3;

    static bool is_blocks(const pg_tensor& w) { return w.dtype >= PG_W_Q8_0 && w.dtype != PG_W_I8; }
    // Floats are multiplied as they are; with bfloat16 a row of odd length needs the other half of its last pair.
    static bool is_float(const pg_tensor& w) { return w.dtype == PG_W_F32 || (w.dtype == PG_W_BF16 && sizeof(Factor) == 4); }
    static bool converts(const Call& c) { return !is_float(c.t[1]) || c.i[0] || (c.t[1].dtype == PG_W_BF16 && c.t[1].cols % 2); }
    static bool converts_once(const Call& c, int num_threads) { return num_threads > 1 && c.rows > kFewRows && converts(c); }
    static bool unpacks(const Call& c) { return is_blocks(c.t[1]) && c.rows > kUnpackRows; }
    static int64_t row_bytes(const pg_tensor& w) {
        if (w.dtype == PG_W_F32) return round_up(w.cols * 4, 64);
        if (w.dtype == PG_W_BF16) return round_up((w.cols + 1) * int64_t(sizeof(Factor)), 64);
        if (w.dtype == PG_W_I8) return i8_row_bytes(w.cols);
        int64_t bytes = 0;
#define PG_QUANT_ROW(Format, Act) bytes = quant_row_bytes<Act>(w.cols)
        PG_BLOCK_FORMAT(w.dtype, PG_QUANT_ROW)
#undef PG_QUANT_ROW
        return bytes;
    }
    static int64_t room_bytes(const pg_tensor& w) {
        int64_t bytes = 0;
#define PG_ROOM(Format, Act) bytes = UnpackedOf<Format, Act>::kBytes
        PG_BLOCK_FORMAT(w.dtype, PG_ROOM)
#undef PG_ROOM
        return w.cols / 32 * bytes * kBlockPanels;
    }
    static int64_t rows_bytes(const Call& c, int num_threads) {
        int64_t own = num_threads * (c.rows < kFewRows ? c.rows : kFewRows);
        return converts(c) ? row_bytes(c.t[1]) * (c.rows > own ? c.rows : own) : 0;
    }
    static int64_t prepared_bytes(const Call& c) {
        if (c.t[1].dtype == PG_W_I8) return i8_room_bytes(c.t[1].cols);
        return c.i[0] ? round_up(c.t[1].cols * 4, 64) : 0;
    }
    static int phases(const Call& c, int num_threads) { return converts_once(c, num_threads) ? 2 : 1; }
    static int64_t scratch(const Call& c, int num_threads) {
        return rows_bytes(c, num_threads) + num_threads * (prepared_bytes(c) + (unpacks(c) ? room_bytes(c.t[1]) : 0));
    }

    static void convert(const Call& c, char* to, int64_t begin, int64_t end, char* room) {
        const pg_tensor& w = c.t[1];
        const int64_t bytes = row_bytes(w);
        for (int64_t r = begin; r < end; ++r) {
            char* y = to + r * bytes;
            const float* x = row<float>(c.t[0], r);
            if (c.i[0]) {
                float* normal = (float*)(is_float(w) ? y : room);
                rms_norm_op::normalise(x, normal, static_cast<const float*>(c.t[5].data), w.cols, float(c.f[0]));
                x = normal;
            }
            if (w.dtype == PG_W_F32) continue;
            if (w.dtype == PG_W_BF16) {
                row_to_factors(x, (Factor*)y, w.cols);
                ((Factor*)y)[w.cols] = 0;   // the other half of the last pair when K is odd
                continue;
            }
            if (w.dtype == PG_W_I8) {
                float* copy = (float*)room;
                if (x != copy) memcpy(copy, x, size_t(w.cols) * 4);
                i8_round_row(copy, copy + w.cols, y, w.cols, i8_cosines(w));
                continue;
            }
#define PG_QUANTISE(Format, Act) quantise_row<Format, Act>(x, y, w.cols)
            PG_BLOCK_FORMAT(w.dtype, PG_QUANTISE)
#undef PG_QUANTISE
        }
    }

    static void run(const Call& c, int phase, int tid, int num_threads) {
        char *x = c.scratch, *room = c.scratch + rows_bytes(c, num_threads) + tid * prepared_bytes(c);
        int64_t begin, end;
        if (converts_once(c, num_threads)) {
            if (phase == 0) {
                fetch_first(c, tid);
                while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end)) convert(c, x, begin, end, room);
                return;
            }
        } else if (converts(c)) {
            x += tid * c.rows * row_bytes(c.t[1]);
            convert(c, x, 0, c.rows, room);
        }
        if (unpacks(c)) return multiply_unpacked(c, x, tid, num_threads);
        if (c.t[1].dtype == PG_W_F32 || c.t[1].dtype == PG_W_BF16) return multiply_floats(c, x, tid, num_threads);
        if (c.t[1].dtype == PG_W_I8) return i8_product(c, x, finish_of(c), tid, num_threads);
        const Finish finish = finish_of(c);
#define PG_STORED(Format, Act) multiply_panels(c, StoredRows<Format, Act>(c, x, finish), tid, num_threads)
        PG_BLOCK_FORMAT(c.t[1].dtype, PG_STORED)
#undef PG_STORED
    }
    static Finish finish_of(const Call& c) { return {&c.t[2], &c.t[3], &c.t[4], c.t[1].rows, c.i[1]}; }

    // The panels this thread will probably begin with come from memory while the rows are converted.
    static void fetch_first(const Call& c, int tid) {
        const pg_tensor& w = c.t[1];
        if (!unpacks(c)) return;
        int64_t bytes = 0;
#define PG_PANEL_BYTES(Format, Act) bytes = bytes_of_panel<Format>(w.cols) * kBlockPanels
        PG_BLOCK_FORMAT(w.dtype, PG_PANEL_BYTES)
#undef PG_PANEL_BYTES
        if ((tid + 1) * 16 * kBlockPanels > w.rows) return;
        const char* at = static_cast<const char*>(w.data) + tid * bytes;
        for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + b, 0, 2);
    }

    static void multiply_floats(const Call& c, const char* x, int tid, int num_threads) {
        const Finish finish = finish_of(c);
        const bool is_own = converts(c);
        const char* rows = is_own ? x : (const char*)row<float>(c.t[0], 0);
        const int64_t bytes = is_own ? row_bytes(c.t[1]) : c.t[0].stride * 4;
        if (c.t[1].dtype == PG_W_BF16) return float_product<Bf16Panels>(c, (const Factor*)rows, bytes / int64_t(sizeof(Factor)), finish, tid, num_threads);
        float_product<F32Panels>(c, (const float*)rows, bytes / 4, finish, tid, num_threads);
    }

    // Tasks are groups of panels; of a narrow weight, groups and parts of the rows.
    static void multiply_unpacked(const Call& c, const char* x, int tid, int num_threads) {
        const pg_tensor& w = c.t[1];
        const Finish finish = finish_of(c);
        char* room = c.scratch + rows_bytes(c, num_threads) + num_threads * prepared_bytes(c) + tid * room_bytes(w);
        const int64_t groups = (c.t[4].cols + 16 * kBlockPanels - 1) / (16 * kBlockPanels);   // of a gated product the gate's
        const int64_t wanted = (4 * num_threads + groups - 1) / groups, most = (c.rows + kPartRows - 1) / kPartRows;
        const int64_t least = row_parts(c.rows, row_bytes(w)), parts = wanted > most ? most : wanted > least ? wanted : least;
        const int64_t part_rows = (c.rows + parts - 1) / parts;
        int64_t begin, end;
        const int64_t chunk = parts > 1 ? 1 : chunk_for(groups, 4 * num_threads);   // small, so that shares come out even
        while (take(c, groups * parts, chunk, &begin, &end)) {
            const int64_t r = begin / groups * part_rows, rows = c.rows - r < part_rows ? c.rows - r : part_rows;
            if (rows <= 0) continue;
            const int64_t to = parts > 1 ? begin % groups + 1 : end;
            const int64_t likely = upcoming(c) + (num_threads - 1) * chunk;   // the others come first
            for (int64_t g = begin % groups; g < to; ++g) {
                const int64_t next = g + 1 < to ? g + 1 : likely % groups;
#define PG_UNPACKED(Format, Act)                                                                         \
    unpacked_panels<Format, Act>(x, w, r, rows, g, c.i[1] ? g + groups : next, room, finish);            \
    if (c.i[1]) unpacked_panels<Format, Act>(x, w, r, rows, g + groups, next, room, finish)
                PG_BLOCK_FORMAT(w.dtype, PG_UNPACKED)
#undef PG_UNPACKED
            }
        }
    }
    static constexpr int64_t kPartRows = 96;   // fewer would spend too much of their time on unpacking
};
