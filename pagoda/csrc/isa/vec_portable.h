// The vector interface without intrinsics: four vectors of the compiler's own, which every 64-bit CPU has registers
// for (SSE2, NEON). There is no fused multiply-add here: fma rounds twice. See vec_avx512.h for what each does.
#pragma once

#define PG_MEMBER inline __attribute__((always_inline))
#define PG_INLINE static PG_MEMBER

constexpr int kTileRows = 2;
constexpr int kTilePanels = 1;
constexpr int kLonePanels = 1;
constexpr int kBlockRows = 1;
constexpr int kBlockPanels = 1;
constexpr int kStoredRows = 1;
constexpr int kStoredPanels = 1;
constexpr int kUnpackRows = 4;
constexpr int kI8Rows = 2;
constexpr int kI8Panels = 1;
constexpr int kLoneI8Panels = 1;
constexpr int kFetchSteps = 4;
constexpr int64_t kRowsBytes = 192 << 10;

typedef float f32x4 __attribute__((vector_size(16)));
typedef int32_t i32x4 __attribute__((vector_size(16)));
struct f32x16 { f32x4 v[4]; };
struct i32x16 { i32x4 v[4]; };
typedef i32x16 u8x64;

#define PG_EACH(R, expression)                  \
    R r;                                        \
    _Pragma("GCC unroll 4") for (int k = 0; k < 4; ++k) r.v[k] = (expression); \
    return r

PG_INLINE f32x4 splat(float x) { return f32x4{x, x, x, x}; }
PG_INLINE f32x4 blend(i32x4 mask, f32x4 yes, f32x4 no) { return (f32x4)((mask & (i32x4)yes) | (~mask & (i32x4)no)); }

PG_INLINE f32x16 set1(float x) { PG_EACH(f32x16, splat(x)); }
PG_INLINE f32x16 zero() { return set1(0.0f); }
PG_INLINE f32x16 load(const float* p) { f32x16 r; __builtin_memcpy(&r, p, 64); return r; }
PG_INLINE void store(float* p, f32x16 v) { __builtin_memcpy(p, &v, 64); }
PG_INLINE f32x16 load_n(const float* p, int64_t n) {
    float t[16] = {};
    for (int64_t i = 0; i < n; ++i) t[i] = p[i];
    return load(t);
}
PG_INLINE void store_n(float* p, f32x16 v, int64_t n) {
    float t[16];
    store(t, v);
    for (int64_t i = 0; i < n; ++i) p[i] = t[i];
}
PG_INLINE f32x16 add(f32x16 a, f32x16 b) { PG_EACH(f32x16, a.v[k] + b.v[k]); }
PG_INLINE f32x16 sub(f32x16 a, f32x16 b) { PG_EACH(f32x16, a.v[k] - b.v[k]); }
PG_INLINE f32x16 mul(f32x16 a, f32x16 b) { PG_EACH(f32x16, a.v[k] * b.v[k]); }
PG_INLINE f32x16 div(f32x16 a, f32x16 b) { PG_EACH(f32x16, a.v[k] / b.v[k]); }
PG_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { PG_EACH(f32x16, a.v[k] * b.v[k] + c.v[k]); }
PG_INLINE f32x16 max(f32x16 a, f32x16 b) { PG_EACH(f32x16, blend((i32x4)(a.v[k] > b.v[k]), a.v[k], b.v[k])); }
PG_INLINE f32x16 min(f32x16 a, f32x16 b) { PG_EACH(f32x16, blend((i32x4)(a.v[k] < b.v[k]), a.v[k], b.v[k])); }
PG_INLINE f32x16 select_lt(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
    PG_EACH(f32x16, blend((i32x4)(a.v[k] < b.v[k]), yes.v[k], no.v[k]));
}
PG_INLINE bool any_above(f32x16 v, float x) {
    const f32x4 least = splat(x);
    const i32x4 found = (v.v[0] > least) | (v.v[1] > least) | (v.v[2] > least) | (v.v[3] > least);
    return (found[0] | found[1] | found[2] | found[3]) != 0;
}
PG_INLINE f32x16 keep_lanes(f32x16 v, int64_t lo, int64_t hi, f32x16 other) {
    float t[16], o[16];
    store(t, v);
    store(o, other);
    for (int i = 0; i < 16; ++i) t[i] = i >= lo && i < hi ? t[i] : o[i];
    return load(t);
}

PG_INLINE i32x16 iset1(int32_t x) { PG_EACH(i32x16, (i32x4{x, x, x, x})); }
PG_INLINE f32x16 to_f32(i32x16 a) { PG_EACH(f32x16, __builtin_convertvector(a.v[k], f32x4)); }
PG_INLINE i32x16 bits(f32x16 a) { PG_EACH(i32x16, (i32x4)a.v[k]); }
PG_INLINE f32x16 unbits(i32x16 a) { PG_EACH(f32x16, (f32x4)a.v[k]); }
PG_INLINE i32x16 iadd(i32x16 a, i32x16 b) { PG_EACH(i32x16, a.v[k] + b.v[k]); }
PG_INLINE i32x16 isub(i32x16 a, i32x16 b) { PG_EACH(i32x16, a.v[k] - b.v[k]); }
PG_INLINE i32x16 imax(i32x16 a, i32x16 b) { PG_EACH(i32x16, (i32x4)blend((i32x4)(a.v[k] > b.v[k]), (f32x4)a.v[k], (f32x4)b.v[k])); }
PG_INLINE i32x16 magnitude(f32x16 a) { PG_EACH(i32x16, (i32x4)a.v[k] & 0x7fffffff); }
template <int kBit>
PG_INLINE f32x16 swap_lanes(f32x16 a) {
    float from[16], to[16];
    store(from, a);
    for (int i = 0; i < 16; ++i) to[i] = from[i ^ kBit];
    return load(to);
}
template <int N>
PG_INLINE i32x16 shift_left(i32x16 a) { PG_EACH(i32x16, a.v[k] << N); }

PG_INLINE float half_to_float(uint16_t h) {
    // Shifting the 15 magnitude bits up by 13 leaves the exponent 112 too low; the product corrects it, subnormals too.
    uint32_t magnitude = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    float f;
    __builtin_memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
    uint32_t u;
    __builtin_memcpy(&u, &f, 4);
    u |= sign | ((h & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u);
    __builtin_memcpy(&f, &u, 4);
    return f;
}
PG_INLINE f32x16 load_f16(const void* p) {
    uint16_t h[16];
    float t[16];
    __builtin_memcpy(h, p, 32);
    for (int i = 0; i < 16; ++i) t[i] = half_to_float(h[i]);
    return load(t);
}
PG_INLINE f32x16 load_bf16(const uint16_t* p) {
    uint32_t t[16];
    for (int i = 0; i < 16; ++i) t[i] = uint32_t(p[i]) << 16;
    f32x16 r;
    __builtin_memcpy(&r, t, 64);
    return r;
}
PG_INLINE u8x64 load_bytes(const void* p) { u8x64 r; __builtin_memcpy(&r, p, 64); return r; }
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef int16_t i16x8 __attribute__((vector_size(16)));
template <int kShift, int kMask>
PG_INLINE i32x16 words(u8x64 a) {
    PG_EACH(i32x16, (i32x4)((kShift < 0 ? (u16x8)a.v[k] << (kShift < 0 ? -kShift : 0) : (u16x8)a.v[k] >> (kShift > 0 ? kShift : 0)) & (u16x8{} + uint16_t(kMask))));
}
// Of each 16-bit word the first byte, or the second, with its sign.
template <int S>
PG_INLINE i32x16 signed_words(u8x64 a) {
    PG_EACH(i32x16, (i32x4)((i16x8)((u16x8)a.v[k] << (S == 0 ? 8 : 0)) >> 8));
}
PG_INLINE void store_bytes(void* p, u8x64 v) { __builtin_memcpy(p, &v, 64); }
PG_INLINE u8x64 either(u8x64 a, u8x64 b) { PG_EACH(i32x16, a.v[k] | b.v[k]); }
PG_INLINE i32x16 load_word(const char* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return iset1(word);
}
// Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
PG_INLINE i32x16 round_i32(f32x16 v) {
    i32x16 shifted = bits(add(v, set1(12582912.0f)));
    PG_EACH(i32x16, shifted.v[k] - 0x4B400000);
}
#if defined(__SSE2__)   // in every x86-64; the product of 16-bit integers is the one thing the plain vectors have no word for
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) {
    PG_EACH(i32x16, acc.v[k] + (i32x4)_mm_madd_epi16((__m128i)a.v[k], (__m128i)b.v[k]));
}
#else
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) {
    PG_EACH(i32x16, acc.v[k] + ((a.v[k] << 16) >> 16) * ((b.v[k] << 16) >> 16) + (a.v[k] >> 16) * (b.v[k] >> 16));
}
#endif
typedef float Factor;
template <int kHalf>
PG_INLINE f32x16 half_bf16(u8x64 w) { PG_EACH(f32x16, (f32x4)(kHalf == 0 ? w.v[k] << 16 : w.v[k] & int32_t(0xffff0000u))); }
#undef PG_EACH

PG_INLINE int32_t sum_lanes(i32x16 v) {
    uint32_t t[16], total = 0;   // unsigned: what a NaN became may wrap
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) total += t[i];
    return int32_t(total);
}
PG_INLINE int32_t largest(i32x16 v) {
    int32_t t[16], most = INT32_MIN;
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) most = t[i] > most ? t[i] : most;
    return most;
}
PG_INLINE f32x16 load_i8(const void* p) {
    int8_t q[16];
    float t[16];
    __builtin_memcpy(q, p, 16);
    for (int i = 0; i < 16; ++i) t[i] = float(q[i]);
    return load(t);
}
PG_INLINE void store_i8(int8_t* p, i32x16 v) {
    int32_t t[16];
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) p[i] = int8_t(t[i]);
}
PG_INLINE void store_i16(int16_t* p, i32x16 v) {
    int32_t t[16];
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) p[i] = int16_t(t[i]);
}
PG_INLINE void store_i16_0213(int16_t* p, i32x16 v) {
    int32_t t[16];
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) p[i] = int16_t(t[i / 4 * 4 + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4)]);
}
PG_INLINE i32x16 in_register(i32x16 v) { return v; }
