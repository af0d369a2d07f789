// What a kernel sees: its operands, scratch memory, a ticket counter to share work by, and a place to report a fault.
#pragma once
#include <atomic>
#include <stddef.h>
#include <stdint.h>

#include "api.h"

namespace pg {

struct Call {
    const pg_tensor* t;
    const int64_t* i;
    const double* f;
    char* scratch;                     // op.scratch() bytes, 64-byte aligned, shared by all threads
    std::atomic<int64_t>* ticket;      // zero when the phase starts; own per phase
    std::atomic<const char*>* fault;   // first bad value found in an operand's contents
    int64_t rows;                      // rows of the op's domain: rows of the operand the op table names
};

// One op on one instruction set. Kernels run on all threads at once; between two phases all threads have met.
struct Op {
    const char* name;
    int num_tensors;
    int domain;                                              // which operand's rows set Call::rows
    const char* (*check)(const Call&);                       // nullptr, or what is wrong with shapes and types
    int (*phases)(const Call&, int num_threads);
    int64_t (*scratch)(const Call&, int num_threads);        // never shrinks when rows grow
    void (*run)(const Call&, int phase, int tid, int num_threads);
};

struct Isa {
    const char* name;
    const Op* ops;
};

// The next `chunk` items of `count`, or false when none are left. Which thread gets which item never changes a result.
static inline bool take(const Call& c, int64_t count, int64_t chunk, int64_t* begin, int64_t* end) {
    int64_t at = c.ticket->fetch_add(chunk, std::memory_order_relaxed);
    if (at >= count) return false;
    *begin = at;
    *end = at + chunk < count ? at + chunk : count;
    return true;
}

// Where the next take() would begin, if nobody else takes first: a hint of what to fetch ahead.
static inline int64_t upcoming(const Call& c) { return c.ticket->load(std::memory_order_relaxed); }

static inline int64_t chunk_for(int64_t count, int num_threads, int64_t least = 1) {
    int64_t chunk = count / (int64_t(num_threads) * 4);
    return chunk > least ? chunk : least;
}

static inline void report(const Call& c, const char* what) {
    const char* none = nullptr;
    c.fault->compare_exchange_strong(none, what);
}

template <class T>
static inline T* row(const pg_tensor& t, int64_t r) {
    return static_cast<T*>(t.data) + r * t.stride;
}

// Element i of a one-dimensional index operand of either width.
static inline int64_t index_at(const pg_tensor& t, int64_t i) {
    return t.dtype == PG_I64 ? static_cast<const int64_t*>(t.data)[i] : static_cast<const int32_t*>(t.data)[i];
}

// Bytes of the last cache, which all threads share; a guess where the system does not say.
int64_t last_level_bytes();

static inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

}  // namespace pg
