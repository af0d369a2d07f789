// Parts of the vector interface on AVX2 and on no instruction set at all. See vec_avx512.h for what each does.
#pragma once

PG_INLINE int32_t sum_lanes(i32x16 v) {
    uint32_t t[16], total = 0;   // unsigned: what a NaN became may wrap
    __builtin_memcpy(t, &v, 64);
    for (int i = 0; i < 16; ++i) total += t[i];
    return int32_t(total);
}
PG_INLINE int32_t largest_magnitude(f32x16 a, f32x16 b) {
    int32_t s[16], t[16], most = 0;
    __builtin_memcpy(s, &a, 64);
    __builtin_memcpy(t, &b, 64);
    for (int i = 0; i < 16; ++i) {
        const int32_t x = s[i] & 0x7fffffff, y = t[i] & 0x7fffffff, larger = x > y ? x : y;
        most = larger > most ? larger : most;
    }
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
