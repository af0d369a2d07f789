// The vector interface on AVX2, FMA and F16C: sixteen lanes are two registers. See vec_avx512.h for what each does.
#pragma once

#define PG_MEMBER inline __attribute__((always_inline))
#define PG_INLINE static PG_MEMBER

constexpr int kTileRows = 4;
constexpr int kTilePanels = 1;
constexpr int kBlockRows = 3;
constexpr int kBlockPanels = 1;
constexpr int kStoredRows = 3;
constexpr int kUnpackRows = 6;
constexpr int kI8Rows = 4;
constexpr int kI8Panels = 1;

struct f32x16 { __m256 a, b; };
struct i32x16 { __m256i a, b; };
typedef i32x16 u8x64;

PG_INLINE f32x16 set1(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
PG_INLINE f32x16 zero() { return set1(0.0f); }
PG_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
PG_INLINE void store(float* p, f32x16 v) { _mm256_storeu_ps(p, v.a); _mm256_storeu_ps(p + 8, v.b); }
PG_INLINE __m256i first(int64_t n) {   // all ones in lanes below n
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
PG_INLINE f32x16 load_n(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, first(n)), _mm256_maskload_ps(p + 8, first(n - 8))};
}
PG_INLINE void store_n(float* p, f32x16 v, int64_t n) {
    _mm256_maskstore_ps(p, first(n), v.a);
    _mm256_maskstore_ps(p + 8, first(n - 8), v.b);
}
PG_INLINE f32x16 add(f32x16 x, f32x16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
PG_INLINE f32x16 sub(f32x16 x, f32x16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
PG_INLINE f32x16 mul(f32x16 x, f32x16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
PG_INLINE f32x16 div(f32x16 x, f32x16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
PG_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
PG_INLINE f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
PG_INLINE f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
PG_INLINE f32x16 select_lt(f32x16 x, f32x16 y, f32x16 yes, f32x16 no) {
    return {_mm256_blendv_ps(no.a, yes.a, _mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.b, yes.b, _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ))};
}
PG_INLINE bool any_above(f32x16 v, float x) {
    const __m256 least = _mm256_set1_ps(x);
    return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(v.a, least, _CMP_GT_OQ), _mm256_cmp_ps(v.b, least, _CMP_GT_OQ))) != 0;
}
PG_INLINE f32x16 keep_lanes(f32x16 v, int64_t lo, int64_t hi, f32x16 other) {
    lo = lo < 0 ? 0 : lo > 16 ? 16 : lo;
    hi = hi < 0 ? 0 : hi > 16 ? 16 : hi;
    __m256 a = _mm256_castsi256_ps(_mm256_andnot_si256(first(lo), first(hi)));
    __m256 b = _mm256_castsi256_ps(_mm256_andnot_si256(first(lo - 8), first(hi - 8)));
    return {_mm256_blendv_ps(other.a, v.a, a), _mm256_blendv_ps(other.b, v.b, b)};
}

PG_INLINE i32x16 iset1(int32_t x) { __m256i v = _mm256_set1_epi32(x); return {v, v}; }
PG_INLINE f32x16 to_f32(i32x16 v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
PG_INLINE i32x16 bits(f32x16 v) { return {_mm256_castps_si256(v.a), _mm256_castps_si256(v.b)}; }
PG_INLINE f32x16 unbits(i32x16 v) { return {_mm256_castsi256_ps(v.a), _mm256_castsi256_ps(v.b)}; }
PG_INLINE i32x16 iadd(i32x16 x, i32x16 y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
PG_INLINE i32x16 imax(i32x16 x, i32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
PG_INLINE i32x16 magnitude(f32x16 v) {
    const __m256i all = _mm256_set1_epi32(0x7fffffff);
    return {_mm256_and_si256(bits(v).a, all), _mm256_and_si256(bits(v).b, all)};
}
template <int kBit>
PG_INLINE f32x16 swap_lanes(f32x16 v) {
    if constexpr (kBit == 8) return {v.b, v.a};
    else if constexpr (kBit == 4) return {_mm256_permute2f128_ps(v.a, v.a, 1), _mm256_permute2f128_ps(v.b, v.b, 1)};
    else return {_mm256_permute_ps(v.a, kBit == 1 ? 0xb1 : 0x4e), _mm256_permute_ps(v.b, kBit == 1 ? 0xb1 : 0x4e)};
}
template <int N>
PG_INLINE i32x16 shift_left(i32x16 v) { return {_mm256_slli_epi32(v.a, N), _mm256_slli_epi32(v.b, N)}; }

PG_INLINE f32x16 load_f16(const void* p) {
    const __m128i* h = (const __m128i*)p;
    return {_mm256_cvtph_ps(_mm_loadu_si128(h)), _mm256_cvtph_ps(_mm_loadu_si128(h + 1))};
}
PG_INLINE f32x16 load_bf16(const uint16_t* p) {
    const __m128i* h = (const __m128i*)p;
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(h + 1)), 16))};
}
PG_INLINE u8x64 load_bytes(const void* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
template <int kShift, int kMask>
PG_INLINE __m256i words_half(__m256i v) {
    if constexpr (kShift > 0) v = _mm256_srli_epi16(v, kShift);
    if constexpr (kShift < 0) v = _mm256_slli_epi16(v, -kShift);
    return kMask == (0xffff >> (kShift > 0 ? kShift : 0)) ? v : _mm256_and_si256(v, _mm256_set1_epi16(kMask));
}
template <int kShift, int kMask>
PG_INLINE i32x16 words(u8x64 v) { return {words_half<kShift, kMask>(v.a), words_half<kShift, kMask>(v.b)}; }
PG_INLINE void store_bytes(void* p, u8x64 v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)p + 1, v.b);
}
PG_INLINE u8x64 either(u8x64 x, u8x64 y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
PG_INLINE i32x16 load_word(const char* p) {
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return iset1(word);
}
PG_INLINE i32x16 round_i32(f32x16 v) { return {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}; }
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(a.a, b.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(a.b, b.b))};
}
PG_INLINE i32x16 dot_u8(i32x16 acc, u8x64 a, i32x16 b) {   // in 16-bit words, which cannot saturate
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(b.a, 8), 8), odd = _mm256_srai_epi16(b.a, 8);
    return dot_i16(dot_i16(acc, words<0, 255>(a), {even, even}), words<8, 255>(a), {odd, odd});
}
PG_INLINE f32x16 dot_bf16(f32x16 acc, u8x64 w, const uint16_t* x) {
    uint32_t pair;
    __builtin_memcpy(&pair, x, 4);
    f32x16 x0 = unbits(iset1(int32_t(pair << 16))), x1 = unbits(iset1(int32_t(pair & 0xffff0000u)));
    __m256i high = _mm256_set1_epi32(int32_t(0xffff0000u));
    acc = fma(unbits(shift_left<16>(w)), x0, acc);
    return fma(unbits(i32x16{_mm256_and_si256(w.a, high), _mm256_and_si256(w.b, high)}), x1, acc);
}
#include "isa/vec_plain.h"
