// Block-quantised weights in panels of 16 outputs (drawn in pagoda/kernels/weight.py): how each format yields a block.
//
// A block is 32 values of K. Whatever the storage, it comes out as eight vectors of unsigned bytes, byte [n][t] of vector j
// being k = 4 j + t of output n; one scale per output and group (of 32 values, or 16); and, where the format has
// one, a minimum: value = scale * (byte - kZero) + minimum. `unit` points at the 32 or 256 values stored together, `b` is
// the block within them.
#pragma once

template <int J>
PG_INLINE u8x64 nibbles(const char* p) {
    if constexpr (J < 4) return words<0, 0x0f0f>(load_bytes(p + 64 * J));
    else return words<4, 0x0f0f>(load_bytes(p + 64 * (J - 4)));
}

struct Q8_0 {
    static constexpr int kUnit = 32, kBytes = 32 + 512, kZero = 128, kGroups = 1, kMost = 255;
    static constexpr bool kHasMin = false;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t) { return load_bytes(unit + 32 + 64 * J); }
    PG_INLINE f32x16 scale(const char* unit, int64_t, int) { return load_f16(unit); }
    PG_INLINE f32x16 minimum(const char*, int64_t) { return zero(); }
};

struct Q4_0 {
    static constexpr int kUnit = 32, kBytes = 32 + 256, kZero = 8, kGroups = 1, kMost = 15;
    static constexpr bool kHasMin = false;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t) { return nibbles<J>(unit + 32); }
    PG_INLINE f32x16 scale(const char* unit, int64_t, int) { return load_f16(unit); }
    PG_INLINE f32x16 minimum(const char*, int64_t) { return zero(); }
};

struct Q4_1 {
    static constexpr int kUnit = 32, kBytes = 64 + 256, kZero = 0, kGroups = 1, kMost = 15;
    static constexpr bool kHasMin = true;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t) { return nibbles<J>(unit + 64); }
    PG_INLINE f32x16 scale(const char* unit, int64_t, int) { return load_f16(unit); }
    PG_INLINE f32x16 minimum(const char* unit, int64_t) { return load_f16(unit + 32); }
};

struct Q4_K {
    static constexpr int kUnit = 256, kBytes = 64 + 256 + 8 * 256, kZero = 0, kGroups = 1, kMost = 15;
    static constexpr bool kHasMin = true;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t b) { return nibbles<J>(unit + 320 + 256 * b); }
    PG_INLINE f32x16 scale(const char* unit, int64_t b, int) { return mul(load_f16(unit), load_i8(unit + 64 + 16 * b)); }
    PG_INLINE f32x16 minimum(const char* unit, int64_t b) {
        return sub(zero(), mul(load_f16(unit + 32), load_i8(unit + 192 + 16 * b)));
    }
};

struct Q5_K {
    static constexpr int kUnit = 256, kBytes = Q4_K::kBytes + 8 * 64, kZero = 0, kGroups = 1, kMost = 31;
    static constexpr bool kHasMin = true;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t b) {
        return either(Q4_K::bytes<J>(unit, b), words<J - 4, 0x1010>(load_bytes(unit + Q4_K::kBytes + 64 * b)));
    }
    PG_INLINE f32x16 scale(const char* unit, int64_t b, int) { return Q4_K::scale(unit, b, 0); }
    PG_INLINE f32x16 minimum(const char* unit, int64_t b) { return Q4_K::minimum(unit, b); }
};

struct Q6_K {
    static constexpr int kUnit = 256, kBytes = 32 + 256 + 8 * (256 + 128), kZero = 32, kGroups = 2, kMost = 63;
    static constexpr bool kHasMin = false;
    template <int J>
    PG_INLINE u8x64 bytes(const char* unit, int64_t b) {
        const char* q = unit + 288 + 384 * b;
        return either(nibbles<J>(q), words<2 * (J % 4) - 4, 0x3030>(load_bytes(q + 256 + 64 * (J / 4))));
    }
    PG_INLINE f32x16 scale(const char* unit, int64_t b, int group) {
        return mul(load_f16(unit), load_i8(unit + 32 + 32 * b + 16 * group));
    }
    PG_INLINE f32x16 minimum(const char*, int64_t) { return zero(); }
};

template <class Format>
PG_INLINE int64_t bytes_of_panel(int64_t k) { return k / Format::kUnit * Format::kBytes; }

// Eight vectors of bytes as they are.
struct Bytes {
    static constexpr int kSteps = 8;
};

// How activations of a block are kept, and how products with them are summed: a Sum begins with what the offset of the weights' bytes adds,
// takes product after product with 64 bytes of weights, the first being S = 0, and is an integer a lane at its end.
struct Int8 : Bytes {
    using Element = int8_t;
    static constexpr float kMost = 127.0f;
    PG_INLINE void put(Element* to, i32x16 v) { store_i8(to, v); }

    struct Sum {
        i32x16 lanes;
        PG_MEMBER void begin(int32_t start) { lanes = iset1(start); }
#if defined(PG_HAS_DOT_U8)
        template <int S>
        PG_MEMBER void add(u8x64 w, i32x16 x) { lanes = dot_u8(lanes, w, x); }
#endif
        template <int, bool>
        PG_MEMBER i32x16 end(int32_t) const { return lanes; }
    };
};

// Shifting the 16-bit words of the weights' bytes right brings up the k's of a group of four as (0, 2), then (1, 3), in
// the two halves of each output's lane: activations are kept in that order.
struct Int16 {
    using Element = int16_t;
    static constexpr int kSteps = 16;
    static constexpr float kMost = 32767.0f;
    PG_INLINE void put(Element* to, i32x16 v) { store_i16_0213(to, v); }

    struct Sum {
        i32x16 lanes;
        PG_MEMBER void begin(int32_t start) { lanes = iset1(start); }
        template <int S>
        PG_MEMBER void add(i32x16 w, i32x16 x) { lanes = dot_i16(lanes, w, x); }
        template <int, bool>
        PG_MEMBER i32x16 end(int32_t) const { return lanes; }
    };
};

// The same integers as Int8, for instruction sets that multiply no bytes.
struct Int8Words : Int16 {
    static constexpr float kMost = 127.0f;
};

#if defined(PG_HAS_DOT_U8)
using Int8Row = Int8;
template <class Format>
using Int8Of = Int8;
#elif defined(PG_HAS_BYTE_SUMS)
// The same integers as Int8, summed in 16-bit words as long as these hold them: kWords products of small bytes.
template <int kWords>
struct Int8Sums : Int8 {
    struct Sum {
        i32x16 words, lanes;
        PG_MEMBER void begin(int32_t) {}
        template <int S>
        PG_MEMBER void add(u8x64 w, i32x16 x) {
            if constexpr (S % kWords != 0) {
                words = add_words(words, byte_products(w, x));
            } else {
                widen<S>();
                words = byte_products(w, x);
            }
        }
        // What S products came to joins the lanes.
        template <int S>
        PG_MEMBER void widen() {
            const i32x16 ones = iset1(0x00010001);
            if constexpr (S > 0 && S <= kWords) lanes = dot_i16(iset1(0), words, ones);
            if constexpr (S > kWords) lanes = dot_i16(lanes, words, ones);
        }
        template <int kCount, bool kHasStart>
        PG_MEMBER i32x16 end(int32_t start) {
            widen<kCount>();
            return kHasStart ? iadd(lanes, iset1(start)) : lanes;
        }
    };
};
using Int8Row = Int8Words;
template <bool, class Yes, class>
struct Choose {
    using Type = Yes;
};
template <class Yes, class No>
struct Choose<false, Yes, No> {
    using Type = No;
};
template <class Format>
using Int8Of = typename Choose<Format::kMost <= 63, Int8Sums<32767 / (2 * 127 * Format::kMost)>, Int8Words>::Type;
#else
using Int8Row = Int8Words;
template <class Format>
using Int8Of = Int8Words;
#endif

// What product S of a block takes of the vector of bytes that it needs.
template <class Act, int S>
PG_INLINE u8x64 step_of(u8x64 bytes) {
    if constexpr (Act::kSteps == 8) return bytes;
    else return words<8 * (S & 1), 255>(bytes);
}
template <class Format, class Act, int S>
PG_INLINE u8x64 weights_for(const char* unit, int64_t b) {
    return step_of<Act, S>(Format::template bytes<S * 8 / Act::kSteps>(unit, b));
}

// A panel read where it is stored.
template <class Format, class Activation>
struct Stored {
    using Act = Activation;
    static constexpr int kGroups = Format::kGroups;
    static constexpr bool kHasMin = Format::kHasMin;
    static constexpr int kPer = Format::kUnit / 32;
    template <int S>
    PG_INLINE u8x64 vector(const char* w, int64_t b) { return weights_for<Format, Act, S>(w + b / kPer * Format::kBytes, b % kPer); }
    PG_INLINE f32x16 scale(const char* w, int64_t b, int group) { return Format::scale(w + b / kPer * Format::kBytes, b % kPer, group); }
    PG_INLINE f32x16 minimum(const char* w, int64_t b) { return Format::minimum(w + b / kPer * Format::kBytes, b % kPer); }
};

// A panel unpacked for many rows: { scales as floats, minimum as floats, kSteps vectors ready for the dot product }.
template <int kNumGroups, bool kMin, class Activation>
struct Unpacked {
    using Act = Activation;
    static constexpr int kGroups = kNumGroups;
    static constexpr bool kHasMin = kMin;
    static constexpr int kHead = 64 * (kGroups + kHasMin), kBytes = kHead + 64 * Act::kSteps;
    template <int S>
    PG_INLINE u8x64 vector(const char* w, int64_t b) { return load_bytes(w + b * kBytes + kHead + 64 * S); }
    PG_INLINE f32x16 scale(const char* w, int64_t b, int group) { return load((const float*)(w + b * kBytes + 64 * group)); }
    PG_INLINE f32x16 minimum(const char* w, int64_t b) { return load((const float*)(w + b * kBytes + 64 * kGroups)); }
};

template <class Format, class Act>
using UnpackedOf = Unpacked<Format::kGroups, Format::kHasMin, Act>;

template <class Format, class Act, int S = 0>
PG_INLINE void unpack_vectors(const char* unit, int64_t b, char* to) {
    if constexpr (S < Act::kSteps) {
        store_bytes(to + 64 * S, weights_for<Format, Act, S>(unit, b));
        unpack_vectors<Format, Act, S + 1>(unit, b, to);
    }
}

// Blocks [0, k / 32) of a panel.
template <class Format, class Act>
static void unpack_panel(const char* w, int64_t k, char* to) {
    using Out = UnpackedOf<Format, Act>;
    for (int64_t at = 0; at < k; at += Format::kUnit, w += Format::kBytes)
        for (int64_t b = 0; b < Format::kUnit / 32; ++b, to += Out::kBytes) {
            for (int g = 0; g < Format::kGroups; ++g) store((float*)to + 16 * g, Format::scale(w, b, g));
            if constexpr (Format::kHasMin) store((float*)to + 16 * Format::kGroups, Format::minimum(w, b));
            unpack_vectors<Format, Act>(w, b, to + Out::kHead);
        }
}

// f(Format, activation) for a block format's dtype; the float formats must have been dealt with.
#define PG_BLOCK_FORMAT(dtype, call)                                            \
    switch (dtype) {                                                            \
        case PG_W_Q8_0: call(Q8_0, Int16); break;                               \
        case PG_W_Q4_0: call(Q4_0, Int16); break;                               \
        case PG_W_Q4_1: call(Q4_1, Int16); break;                               \
        case PG_W_Q4_K: call(Q4_K, Int16); break;                               \
        case PG_W_Q5_K: call(Q5_K, Int16); break;                               \
        case PG_W_Q6_K: call(Q6_K, Int16); break;                               \
        case PG_W_Q8_0 | PG_W_INT8: call(Q8_0, Int8Of<Q8_0>); break;            \
        case PG_W_Q4_0 | PG_W_INT8: call(Q4_0, Int8Of<Q4_0>); break;            \
        case PG_W_Q4_1 | PG_W_INT8: call(Q4_1, Int8Of<Q4_1>); break;            \
        case PG_W_Q4_K | PG_W_INT8: call(Q4_K, Int8Of<Q4_K>); break;            \
        case PG_W_Q5_K | PG_W_INT8: call(Q5_K, Int8Of<Q5_K>); break;            \
        default: call(Q6_K, Int8Of<Q6_K>); break;                               \
    }
