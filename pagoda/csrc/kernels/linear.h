// The linear op: turn the activations into what the format multiplies with, then share out panels of 16 outputs.
//
// With few rows every thread converts all of them into scratch of its own, which is cheaper than meeting; with more,
// the rows are shared out and converted once, then the threads meet.
#pragma once

struct linear_op {
    static constexpr int64_t kFewRows = 3;

    static bool converts_once(const Call& c, int num_threads) {
        return num_threads > 1 && c.rows > kFewRows && c.t[1].dtype != PG_W_F32;
    }
    static int64_t row_bytes(const pg_tensor& w) {
        if (w.dtype == PG_W_F32) return 0;
        return w.dtype == PG_W_BF16 ? round_up(w.cols * 2 + 2, 64) : quant_row_bytes(w.cols);
    }
    static int phases(const Call& c, int num_threads) { return converts_once(c, num_threads) ? 2 : 1; }
    static int64_t scratch(const Call& c, int num_threads) {
        int64_t own = num_threads * (c.rows < kFewRows ? c.rows : kFewRows);
        return row_bytes(c.t[1]) * (c.rows > own ? c.rows : own);
    }

    static void convert(const Call& c, char* to, int64_t begin, int64_t end) {
        const pg_tensor& w = c.t[1];
        const int64_t bytes = row_bytes(w);
        for (int64_t r = begin; r < end; ++r) {
            const float* x = row<float>(c.t[0], r);
            if (w.dtype == PG_W_BF16) {
                uint16_t* y = (uint16_t*)(to + r * bytes);
                row_to_bf16(x, y, w.cols);
                y[w.cols] = 0;   // the other half of the last pair when K is odd
            } else {
                quantise_row(x, (QuantBlock*)(to + r * bytes), w.cols);
            }
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
            case PG_W_Q8_0: return block_panels<Q8_0>(x, w, c.rows, begin, end, finish);
            case PG_W_Q4_0: return block_panels<Q4_0>(x, w, c.rows, begin, end, finish);
            default: return block_panels<Q4_1>(x, w, c.rows, begin, end, finish);
        }
    }
};
