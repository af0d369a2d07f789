// Parts of the vector interface on AVX2 and on no instruction set at all. See vec_avx512.h for what each does.
#pragma once

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
