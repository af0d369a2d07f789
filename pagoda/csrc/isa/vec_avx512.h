// The vector interface on AVX-512 (F, BW, VL, DQ), with VNNI and BF16 when the compiler is told they are there.
// Sixteen lanes of float32 or int32, or 64 bytes. Included inside the instruction set's own namespace.
#pragma once

#define PG_MEMBER inline __attribute__((always_inline))
#define PG_INLINE static PG_MEMBER

constexpr int kTileRows = 6;     // rows x panels of accumulators a float product keeps in registers
constexpr int kTilePanels = 4;
constexpr int kLonePanels = 1;   // panels of one row: side by side memory is slower
constexpr int kBlockRows = 6;    // the same of a block-quantised product
constexpr int kBlockPanels = 2;
constexpr int kStoredRows = 11;  // rows of a panel read where it is stored
constexpr int kStoredPanels = 2;   // panels that a tile's rows meet before other rows do
constexpr int kUnpackRows = 1 << 30;   // with more rows than these panels are unpacked first: never, since 11 rows share what it costs
constexpr int kI8Rows = 12;      // rows x panels of accumulators of a product with one scale an output
constexpr int kI8Panels = 2;
constexpr int kLoneI8Panels = 1;
constexpr int kFetchSteps = 1;     // steps of a float product between two looks at what is to be fetched
constexpr int64_t kRowsBytes = 512 << 10;   // rows that are multiplied with all panels before others: half of the second cache

typedef __m512 f32x16;
typedef __m512i i32x16;
typedef __m512i u8x64;

PG_INLINE f32x16 zero() { return _mm512_setzero_ps(); }
PG_INLINE f32x16 set1(float x) { return _mm512_set1_ps(x); }
PG_INLINE f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
PG_INLINE void store(float* p, f32x16 v) { _mm512_storeu_ps(p, v); }
PG_INLINE __mmask16 first(int64_t n) { return __mmask16((1u << n) - 1u); }
PG_INLINE f32x16 load_n(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
PG_INLINE void store_n(float* p, f32x16 v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }
PG_INLINE f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
PG_INLINE f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
PG_INLINE f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
PG_INLINE f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
PG_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
PG_INLINE f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
PG_INLINE f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
// a < b ? yes : no, per lane.
PG_INLINE f32x16 select_lt(f32x16 a, f32x16 b, f32x16 yes, f32x16 no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
#define PG_HAS_POWER   // else kernels/math.h has one
// x - floor(x), and p * 2^floor(x); infinities and what lies below the smallest numbers included.
PG_INLINE f32x16 fraction(f32x16 x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
PG_INLINE f32x16 times_power(f32x16 p, f32x16 x) { return _mm512_scalef_ps(p, x); }
#define PG_HAS_COMPRESS   // else kernels/sample.h has one
// The lanes whose bit is set, one behind the other; up to 16 numbers are written.
PG_INLINE void store_chosen(float* to, f32x16 v, uint32_t lanes) { _mm512_storeu_ps(to, _mm512_maskz_compress_ps(__mmask16(lanes), v)); }
PG_INLINE bool any_above(f32x16 v, float x) { return _mm512_cmp_ps_mask(v, set1(x), _CMP_GT_OQ) != 0; }
// Lanes lo <= i < hi of v, `other` elsewhere; lo and hi may lie outside 0..16.
PG_INLINE f32x16 keep_lanes(f32x16 v, int64_t lo, int64_t hi, f32x16 other) {
    lo = lo < 0 ? 0 : lo > 16 ? 16 : lo;
    hi = hi < 0 ? 0 : hi > 16 ? 16 : hi;
    __mmask16 m = __mmask16(((1u << hi) - 1u) & ~((1u << lo) - 1u));
    return _mm512_mask_blend_ps(m, other, v);
}

PG_INLINE i32x16 iset1(int32_t x) { return _mm512_set1_epi32(x); }
PG_INLINE f32x16 to_f32(i32x16 v) { return _mm512_cvtepi32_ps(v); }
PG_INLINE i32x16 bits(f32x16 v) { return _mm512_castps_si512(v); }
PG_INLINE f32x16 unbits(i32x16 v) { return _mm512_castsi512_ps(v); }
PG_INLINE i32x16 iadd(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
PG_INLINE i32x16 isub(i32x16 a, i32x16 b) { return _mm512_sub_epi32(a, b); }
template <int N>
PG_INLINE i32x16 shift_left(i32x16 v) { return _mm512_slli_epi32(v, N); }

PG_INLINE f32x16 load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
PG_INLINE f32x16 load_bf16(const uint16_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
PG_INLINE u8x64 load_bytes(const void* p) { return _mm512_loadu_si512(p); }
PG_INLINE void store_bytes(void* p, u8x64 v) { _mm512_storeu_si512(p, v); }
PG_INLINE u8x64 either(u8x64 a, u8x64 b) { return _mm512_or_si512(a, b); }
// Each 16-bit word shifted right (left when negative), then masked.
template <int kShift, int kMask>
PG_INLINE i32x16 words(u8x64 v) {
    if constexpr (kShift > 0) v = _mm512_srli_epi16(v, kShift);
    if constexpr (kShift < 0) v = _mm512_slli_epi16(v, -kShift);
    return kMask == (0xffff >> (kShift > 0 ? kShift : 0)) ? v : _mm512_and_si512(v, _mm512_set1_epi16(kMask));
}
PG_INLINE i32x16 load_word(const char* p) {   // four bytes, the same for all lanes
    int32_t word;
    __builtin_memcpy(&word, p, 4);
    return iset1(word);
}
PG_INLINE f32x16 load_i8(const void* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
// To the nearest integer, ties to even.
PG_INLINE i32x16 round_i32(f32x16 v) { return _mm512_cvtps_epi32(v); }
PG_INLINE int32_t sum_lanes(i32x16 v) { return _mm512_reduce_add_epi32(v); }
PG_INLINE i32x16 imax(i32x16 a, i32x16 b) { return _mm512_max_epi32(a, b); }
PG_INLINE int32_t largest(i32x16 v) { return _mm512_reduce_max_epi32(v); }
PG_INLINE i32x16 magnitude(f32x16 v) { return _mm512_and_si512(bits(v), _mm512_set1_epi32(0x7fffffff)); }   // the bits of |x|
// Lane i becomes lane i ^ kBit.
template <int kBit>
PG_INLINE f32x16 swap_lanes(f32x16 v) {
    if constexpr (kBit == 1) return _mm512_permute_ps(v, 0xb1);
    else if constexpr (kBit == 2) return _mm512_permute_ps(v, 0x4e);
    else return _mm512_shuffle_f32x4(v, v, kBit == 4 ? 0xb1 : 0x4e);
}
PG_INLINE void store_i8(int8_t* p, i32x16 v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(v)); }
// The low halves of lanes.
PG_INLINE void store_i16(int16_t* p, i32x16 v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(v)); }
// Of each four values the first, third, second, fourth.
PG_INLINE void store_i16_0213(int16_t* p, i32x16 v) {
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_shuffle_epi32(v, _MM_PERM_DBCA)));
}
// The same integers, as far as the compiler knows in a register: GCC 12 would keep sums that are used after a loop on the stack in it.
PG_INLINE i32x16 in_register(i32x16 v) {
    asm("" : "+v"(v));
    return v;
}
// acc + a[0] b[0] + a[1] b[1] over the two signed 16-bit halves of each lane.
#if defined(__AVX512VNNI__)
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) { return _mm512_dpwssd_epi32(acc, a, b); }
#else
PG_INLINE i32x16 dot_i16(i32x16 acc, i32x16 a, i32x16 b) { return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)); }
#endif

#if defined(__AVX512BF16__)
#define PG_HAS_STORE_BF16   // else kernels/math.h has one
PG_INLINE void store_bf16(uint16_t* p, f32x16 v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }
PG_INLINE u8x64 pack_bf16(f32x16 a, f32x16 b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }   // a below b
#endif

#define PG_HAS_DOT_U8   // else kernels/blocks.h does without
// acc + the four products of unsigned bytes of a with signed bytes of b, per lane.
#if defined(__AVX512VNNI__)
PG_INLINE i32x16 dot_u8(i32x16 acc, u8x64 a, i32x16 b) { return _mm512_dpbusd_epi32(acc, a, b); }
#else
PG_INLINE i32x16 dot_u8(i32x16 acc, u8x64 a, i32x16 b) {   // in 16-bit words, which cannot saturate
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(b, 8), 8), odd = _mm512_srai_epi16(b, 8);
    return dot_i16(dot_i16(acc, words<0, 255>(a), even), words<8, 255>(a), odd);
}
#endif

// What bfloat16 is multiplied with: bfloat16 in pairs, or floats, which need no rounding: for these half_bf16<0 or 1>(pairs) is one
// number of each pair as a float.
#if defined(__AVX512BF16__)
typedef uint16_t Factor;
#define PG_HAS_DOT_BF16
// acc + w[0] x[0] + w[1] x[1] per lane: w pairs of bfloat16, x one pair for all lanes.
PG_INLINE f32x16 dot_bf16(f32x16 acc, u8x64 w, const uint16_t* x) {
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
}
#else
typedef float Factor;
template <int kHalf>
PG_INLINE f32x16 half_bf16(u8x64 w) {
    if constexpr (kHalf == 0) return unbits(shift_left<16>(w));
    else return unbits(_mm512_and_si512(w, _mm512_set1_epi32(int32_t(0xffff0000u))));
}
#endif
