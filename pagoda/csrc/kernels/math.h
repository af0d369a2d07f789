// exp and tanh on vectors, reductions in a fixed order, rounding to bfloat16.
#pragma once

// The bits of the largest |x| of both; not below 0x7f800000 when there is an infinity or a NaN.
PG_INLINE int32_t largest_magnitude(f32x16 a, f32x16 b) { return largest(imax(magnitude(a), magnitude(b))); }

// The largest of all lanes, in each of them.
PG_INLINE i32x16 largest_everywhere(i32x16 v) {
    v = imax(v, bits(swap_lanes<8>(unbits(v))));
    v = imax(v, bits(swap_lanes<4>(unbits(v))));
    v = imax(v, bits(swap_lanes<2>(unbits(v))));
    return imax(v, bits(swap_lanes<1>(unbits(v))));
}

// exp(x) to about 1 ulp; 0 below -87.3 (and for -inf), finite and huge above 88. NaN gives NaN or a finite number.
PG_INLINE f32x16 vexp(f32x16 x) {
    const f32x16 magic = set1(12582912.0f);   // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    f32x16 c = min(max(x, set1(-87.3f)), set1(88.0f));
    f32x16 shifted = fma(c, set1(1.44269504088896341f), magic);
    f32x16 n = sub(shifted, magic);
    f32x16 r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    f32x16 y = unbits(iadd(bits(p), shift_left<23>(bits(shifted))));
    return select_lt(x, set1(-87.3f), zero(), y);
}

PG_INLINE f32x16 vtanh(f32x16 x) {
    f32x16 z = mul(x, x);
    f32x16 p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    f32x16 small = fma(mul(p, z), x, x);
    f32x16 e = vexp(min(max(add(x, x), set1(-40.0f)), set1(40.0f)));
    f32x16 large = sub(set1(1.0f), div(set1(2.0f), add(e, set1(1.0f))));
    return select_lt(z, set1(0.390625f), small, large);
}

// x - floor(x) and p * 2^floor(x), for x in -126 .. 126; what is less counts as -126. The floor of an integer may be one less.
#if !defined(PG_HAS_POWER)
PG_INLINE f32x16 shifted_floor(f32x16 x) { return add(sub(max(set1(-126.0f), x), set1(0.5f)), set1(12582912.0f)); }
PG_INLINE f32x16 fraction(f32x16 x) { return sub(max(set1(-126.0f), x), sub(shifted_floor(x), set1(12582912.0f))); }
PG_INLINE f32x16 times_power(f32x16 p, f32x16 x) { return unbits(iadd(bits(p), shift_left<23>(bits(shifted_floor(x))))); }
#endif
#undef PG_HAS_POWER

// The sum of 16 lanes by halves: (i, i+8), (i, i+4), (i, i+2), (i, i+1).
PG_INLINE float reduce_add(f32x16 v) {
    float t[16];
    store(t, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) t[i] += t[i + half];
    return t[0];
}

PG_INLINE float reduce_max(f32x16 v) {
    float t[16];
    store(t, v);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) t[i] = t[i] > t[i + half] ? t[i] : t[i + half];
    return t[0];
}

PG_INLINE uint16_t to_bf16(float x) {   // nearest, ties to even; NaN stays NaN
    uint32_t u;
    __builtin_memcpy(&u, &x, 4);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return uint16_t((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 64 : rounded);
}

PG_INLINE float from_bf16(uint16_t h) {
    uint32_t u = uint32_t(h) << 16;
    float x;
    __builtin_memcpy(&x, &u, 4);
    return x;
}

// Sixteen numbers that are neither NaN nor denormal, to the nearest, ties to even.
#if !defined(PG_HAS_STORE_BF16)
PG_INLINE void store_bf16(uint16_t* to, f32x16 v) {
    float t[16];
    uint32_t u[16];
    store(t, v);
    __builtin_memcpy(u, t, sizeof u);
    for (int i = 0; i < 16; ++i) to[i] = uint16_t((u[i] + 0x7fffu + ((u[i] >> 16) & 1)) >> 16);
}
PG_INLINE u8x64 pack_bf16(f32x16 a, f32x16 b) {
    uint16_t t[32];
    store_bf16(t, a);
    store_bf16(t + 16, b);
    return load_bytes(t);
}
#endif
#undef PG_HAS_STORE_BF16

static inline void row_to_bf16(const float* __restrict x, uint16_t* __restrict y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = to_bf16(x[i]);
}

// What is multiplied with bfloat16.
PG_INLINE void row_to_factors(const float* x, uint16_t* y, int64_t n) { row_to_bf16(x, y, n); }
PG_INLINE void row_to_factors(const float* x, float* y, int64_t n) {
    if (x != y) memcpy(y, x, size_t(n) * 4);
}
PG_INLINE void put_factor(uint16_t* y, float x) { *y = to_bf16(x); }
PG_INLINE void put_factor(float* y, float x) { *y = x; }

// acc + w[0] x[0] + w[1] x[1] per lane, or part 0 or 1 of it.
#if defined(PG_HAS_DOT_BF16)
constexpr int kPairParts = 1;
template <int>
PG_INLINE f32x16 dot_pair(f32x16 acc, u8x64 w, const Factor* x) { return dot_bf16(acc, w, x); }
#else
constexpr int kPairParts = 2;
template <int kPart>
PG_INLINE f32x16 dot_pair(f32x16 acc, u8x64 w, const Factor* x) { return fma(half_bf16<kPart>(w), set1(x[kPart]), acc); }
#endif
// The same address, which the compiler does not know to be the same: what is there is read again, not kept in registers that are too few.
template <class T>
PG_INLINE const T* again(const T* p) {
    asm("" : "+r"(p));
    return p;
}
