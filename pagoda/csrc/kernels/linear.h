// The linear op: turn the activations into what the format multiplies with, then share out panels of 16 outputs.
//
// With few rows every thread converts all of them into scratch of its own, which is cheaper than meeting; with more,
// the rows are shared out and converted once, then the threads meet. Scratch is the converted rows, then for each thread
// room for the panels it has unpacked.
#pragma once

struct linear_op {
    static constexpr int64_t kFewRows = 3;

    static bool converts_once(const Call& c, int num_threads) {
        return num_threads > 1 && c.rows > kFewRows && c.t[1].dtype != PG_W_F32;
    }
    static bool unpacks(const Call& c) { return c.t[1].dtype >= PG_W_Q8_0 && c.rows > kUnpackRows; }
    static int64_t row_bytes(const pg_tensor& w) {
        if (w.dtype == PG_W_F32) return 0;
        if (w.dtype == PG_W_BF16) return round_up(w.cols * 2 + 2, 64);
        return w.dtype & PG_W_INT8 ? quant_row_bytes<Int8>(w.cols) : quant_row_bytes<Int16>(w.cols);
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
        return row_bytes(c.t[1]) * (c.rows > own ? c.rows : own);
    }
    static int phases(const Call& c, int num_threads) { return converts_once(c, num_threads) ? 2 : 1; }
    static int64_t scratch(const Call& c, int num_threads) {
        return rows_bytes(c, num_threads) + (unpacks(c) ? num_threads * room_bytes(c.t[1]) : 0);
    }

    static void convert(const Call& c, char* to, int64_t begin, int64_t end) {
        const pg_tensor& w = c.t[1];
        const int64_t bytes = row_bytes(w);
        for (int64_t r = begin; r < end; ++r) {
            const float* x = row<float>(c.t[0], r);
            char* y = to + r * bytes;
            if (w.dtype == PG_W_BF16) {
                row_to_bf16(x, (uint16_t*)y, w.cols);
                ((uint16_t*)y)[w.cols] = 0;   // the other half of the last pair when K is odd
                continue;
            }
#define PG_QUANTISE(Format, Act) quantise_row<Format, Act>(x, y, w.cols)
            PG_BLOCK_FORMAT(w.dtype, PG_QUANTISE)
#undef PG_QUANTISE
        }
    }

    static void run(const Call& c, int phase, int tid, int num_threads) {
        char* x = c.scratch;
        int64_t begin, end;
        if (converts_once(c, num_threads)) {
            if (phase == 0) {
                while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end)) convert(c, x, begin, end);
                return;
            }
        } else if (c.t[1].dtype != PG_W_F32) {
            x += tid * c.rows * row_bytes(c.t[1]);
            convert(c, x, 0, c.rows);
        }
        if (unpacks(c)) return multiply_unpacked(c, x, tid, num_threads);
        const int64_t panels = (c.t[1].rows + 15) / 16;
        const int64_t chunk = round_up(chunk_for(panels, num_threads), panels >= 8 * num_threads ? 4 : 1);
        while (take(c, panels, chunk, &begin, &end)) multiply(c, x, begin, end);
    }

    static void multiply(const Call& c, const char* x, int64_t begin, int64_t end) {
        const pg_tensor& w = c.t[1];
        const Finish finish{&c.t[2], &c.t[3], &c.t[4]};
        switch (w.dtype) {
            case PG_W_F32: return float_panels<F32Panels>(row<float>(c.t[0], 0), c.t[0].stride, w, c.rows, begin, end, finish);
            case PG_W_BF16: return float_panels<Bf16Panels>((const uint16_t*)x, row_bytes(w) / 2, w, c.rows, begin, end, finish);
        }
#define PG_STORED(Format, Act) stored_panels<Format, Act>(x, w, c.rows, begin, end, finish)
        PG_BLOCK_FORMAT(w.dtype, PG_STORED)
#undef PG_STORED
    }

    // Tasks are groups of panels; of a narrow weight, groups and parts of the rows.
    static void multiply_unpacked(const Call& c, const char* x, int tid, int num_threads) {
        const pg_tensor& w = c.t[1];
        const Finish finish{&c.t[2], &c.t[3], &c.t[4]};
        char* room = c.scratch + rows_bytes(c, num_threads) + tid * room_bytes(w);
        const int64_t groups = (w.rows + 16 * kBlockPanels - 1) / (16 * kBlockPanels);
        const int64_t wanted = (4 * num_threads + groups - 1) / groups, most = (c.rows + kPartRows - 1) / kPartRows;
        const int64_t parts = wanted < most ? wanted : most, part_rows = (c.rows + parts - 1) / parts;
        int64_t begin, end;
        const int64_t chunk = groups < 16 * num_threads ? 1 : chunk_for(groups, num_threads);   // few groups: even shares
        while (take(c, groups * parts, chunk, &begin, &end)) {
            const int64_t r = begin / groups * part_rows, rows = c.rows - r < part_rows ? c.rows - r : part_rows;
            if (rows <= 0) continue;
            const int64_t to = parts > 1 ? begin % groups + 1 : end;
#define PG_UNPACKED(Format, Act) unpacked_panels<Format, Act>(x, w, r, rows, begin % groups, to, upcoming(c) % groups, room, finish)
            PG_BLOCK_FORMAT(w.dtype, PG_UNPACKED)
#undef PG_UNPACKED
        }
    }
    static constexpr int64_t kPartRows = 96;   // fewer would spend too much of their time on unpacking
};
