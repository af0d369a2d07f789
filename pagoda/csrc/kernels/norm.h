// RMS norm over groups of columns, and the rotary embedding.
#pragma once

struct rms_norm_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        const int64_t group = c.t[1].rows, groups = c.t[0].cols / group;
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r)
                for (int64_t g = 0; g < groups; ++g)
                    normalise(row<float>(c.t[0], r) + g * group, row<float>(c.t[2], r) + g * group,
                              static_cast<const float*>(c.t[1].data), group, float(c.f[0]));
    }

    static void normalise(const float* x, float* y, const float* weight, int64_t n, float eps) {
        const int64_t whole = n & ~int64_t(15);
        f32x16 squares = zero();
        for (int64_t d = 0; d < whole; d += 16) {
            f32x16 v = load(x + d);
            squares = fma(v, v, squares);
        }
        if (whole < n) {
            f32x16 v = load_n(x + whole, n - whole);
            squares = fma(v, v, squares);
        }
        f32x16 factor = set1(1.0f / sqrtf(reduce_add(squares) / float(n) + eps));
        for (int64_t d = 0; d < whole; d += 16) store(y + d, mul(mul(load(x + d), factor), load(weight + d)));
        if (whole < n)
            store_n(y + whole, mul(mul(load_n(x + whole, n - whole), factor), load_n(weight + whole, n - whole)), n - whole);
    }
};

// Rows of heads turned by the angles of their positions.
struct Turning {
    const pg_tensor &positions, &table;   // of int; [positions][cos | sin]

    // x, which belongs to row r, turned into y; false when the table does not have its position.
    bool turn(const Call& c, int64_t r, const float* x, float* y, int64_t width, int64_t head_dim) const {
        const int64_t position = index_at(positions, r), half = table.cols / 2;
        if (position < 0 || position >= table.rows) {
            report(c, "rope: a position is outside the table");
            return false;
        }
        const float* cos = row<float>(table, position);
        for (int64_t d = 0; d < width; d += head_dim) rotate(x + d, y + d, cos, cos + half, half, head_dim);
        return true;
    }

    static void rotate(const float* x, float* y, const float* cos, const float* sin, int64_t half, int64_t head_dim) {
        int64_t i = 0;
        for (; i + 16 <= half; i += 16) {
            f32x16 a = load(x + i), b = load(x + half + i), co = load(cos + i), si = load(sin + i);
            store(y + i, sub(mul(a, co), mul(b, si)));
            store(y + half + i, add(mul(b, co), mul(a, si)));
        }
        for (; i < half; ++i) {
            float a = x[i], b = x[half + i];
            y[i] = a * cos[i] - b * sin[i];
            y[half + i] = b * cos[i] + a * sin[i];
        }
        if (x != y)
            for (i = 2 * half; i < head_dim; ++i) y[i] = x[i];
    }
};

struct rope_op : SimpleOp {
    static void run(const Call& c, int, int, int num_threads) {
        const Turning turning{c.t[1], c.t[2]};
        int64_t begin, end;
        while (take(c, c.rows, chunk_for(c.rows, num_threads), &begin, &end))
            for (int64_t r = begin; r < end; ++r) turning.turn(c, r, row<float>(c.t[0], r), row<float>(c.t[3], r), c.t[0].cols, c.i[0]);
    }
};
