// The vector interface on AVX2, FMA and F16C: sixteen lanes are two registers. See vec_avx512.h for what each does.
#pragma once

#define PG_MEMBER inline __attribute__((always_inline))
#define PG_INLINE static PG_MEMBER

constexpr int kTileRows = 5;
constexpr int kTilePanels = 1;
constexpr int kLonePanels = 4;
constexpr int kBlockRows = 6;
constexpr int kBlockPanels = 1;
constexpr int kStoredRows = 3;
constexpr int kStoredPanels = 1;
constexpr int kUnpackRows = 6;
constexpr int kI8Rows = 5;
constexpr int kI8Panels = 1;
constexpr int kLoneI8Panels = 4;
constexpr int kFetchSteps = 4;
constexpr int64_t kRowsBytes = 192 << 10;

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
PG_INLINE i32x16 isub(i32x16 x, i32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
PG_INLINE i32x16 imax(i32x16 x, i32x16 y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
PG_INLINE i32x16 masked(i32x16 v, int32_t mask) {
    const __m256i all = _mm256_set1_epi32(mask);
    return {_mm256_and_si256(v.a, all), _mm256_and_si256(v.b, all)};
}
PG_INLINE i32x16 magnitude(f32x16 v) { return masked(bits(v), 0x7fffffff); }
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
// A sum as it stands: compilers order sums of integers anew, and then keep all that is to be summed in registers.
PG_INLINE __m256i held(__m256i v) {
    asm("" : "+x"(v));
    return v;
}
PG_INLINE i32x16 in_register(i32x16 v) { return {held(v.a), held(v.b)}; }
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) {
    return {held(_mm256_add_epi32(acc.a, _mm256_madd_epi16(a.a, b.a))), held(_mm256_add_epi32(acc.b, _mm256_madd_epi16(a.b, b.b)))};
}
#define PG_HAS_BYTE_SUMS
// The products of unsigned bytes of a with signed bytes of b, two by two in 16-bit words, which must be wide enough.
PG_INLINE i32x16 byte_products(u8x64 a, i32x16 b) { return {_mm256_maddubs_epi16(a.a, b.a), _mm256_maddubs_epi16(a.b, b.b)}; }
PG_INLINE i32x16 add_words(i32x16 x, i32x16 y) { return {held(_mm256_add_epi16(x.a, y.a)), held(_mm256_add_epi16(x.b, y.b))}; }
typedef float Factor;
template <int kHalf>
PG_INLINE f32x16 half_bf16(u8x64 w) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000u));
    if constexpr (kHalf == 0) return unbits(shift_left<16>(w));
    else return unbits(i32x16{_mm256_and_si256(w.a, high), _mm256_and_si256(w.b, high)});
}

// Sums and largest of lanes by halves; integers, so that the order does not matter.
PG_INLINE int32_t sum_lanes(i32x16 v) {
    const __m256i eight = _mm256_add_epi32(v.a, v.b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
PG_INLINE int32_t largest(i32x16 v) {
    const __m256i eight = _mm256_max_epi32(v.a, v.b);
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
PG_INLINE f32x16 load_i8(const void* p) {
    const __m128i q = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(q)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_unpackhi_epi64(q, q)))};
}
PG_INLINE void store_i8(int8_t* p, i32x16 v) {
    const __m256i low = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
    const __m256i both = _mm256_unpacklo_epi32(_mm256_shuffle_epi8(v.a, low), _mm256_shuffle_epi8(v.b, low));   // a0 b0 . . a1 b1 . .
    const __m256i four = _mm256_permutevar8x32_epi32(both, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
    _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(four));
}
// The low halves of lanes, those of each four in the order that `bytes` gives.
PG_INLINE void store_words(int16_t* p, i32x16 v, __m128i bytes) {
    const __m256i of_both = _mm256_broadcastsi128_si256(bytes);
    const __m256i both = _mm256_unpacklo_epi64(_mm256_shuffle_epi8(v.a, of_both), _mm256_shuffle_epi8(v.b, of_both));   // a0 b0 a1 b1
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(both, 0xd8));
}
PG_INLINE void store_i16(int16_t* p, i32x16 v) { store_words(p, v, _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1)); }
PG_INLINE void store_i16_0213(int16_t* p, i32x16 v) { store_words(p, v, _mm_setr_epi8(0, 1, 8, 9, 4, 5, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1)); }
// Of each 16-bit word the first byte, or the second, with its sign.
PG_INLINE __m256i first_bytes(__m256i v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); }
template <int S>
PG_INLINE i32x16 signed_words(u8x64 v) {
    if constexpr (S == 0) return {first_bytes(v.a), first_bytes(v.b)};
    else return {_mm256_srai_epi16(v.a, 8), _mm256_srai_epi16(v.b, 8)};
}
