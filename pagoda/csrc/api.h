// The plain C interface of the native library: raw pointers and sizes, no Python, no torch, no exceptions out.
//
// Every function that can fail returns 0 for success, else an error code; pg_last_error() then tells why (per thread).
// A handle owns a pool of threads and the choice of instruction set; it serves one caller at a time.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define PG_EXPORT __declspec(dllexport)
#else
#define PG_EXPORT __attribute__((visibility("default")))
#endif

enum { PG_MAX_TENSORS = 12, PG_MAX_INTS = 9, PG_MAX_FLOATS = 2 };

// Element types. The PG_W_* are packed weight formats, drawn in pagoda/kernels/weight.py.
enum pg_dtype {
    PG_F32 = 0,
    PG_BF16 = 1,
    PG_I32 = 2,
    PG_I64 = 3,
    PG_U64 = 4,
    PG_U8 = 5,
    PG_W_F32 = 16,
    PG_W_BF16 = 17,
    PG_W_Q8_0 = 18,
    PG_W_Q4_0 = 19,
    PG_W_Q4_1 = 20,
    PG_W_Q4_K = 21,
    PG_W_Q5_K = 22,
    PG_W_Q6_K = 23,
    PG_W_I8 = 24,
    PG_W_INT8 = 32,   // added to a block format: its product takes activations as 8-bit integers, not 16-bit ones
};

// Where the number of rows of a tensor comes from when a program runs.
enum pg_symbol { PG_FIXED = 0, PG_T = 1, PG_S = 2, PG_R = 3 };

// A matrix whose rows are `stride` elements apart. One-dimensional operands have cols = stride = 1. An operand that is
// not given has data = NULL. In a program `rows` is the most there can be, and `symbol` says what it is at each run.
typedef struct {
    void* data;
    int64_t rows, cols, stride;
    int32_t dtype, symbol;
} pg_tensor;

// One op of a program. `barrier`: all threads wait for each other after it.
typedef struct {
    int32_t opcode, barrier;
    pg_tensor t[PG_MAX_TENSORS];
    int64_t i[PG_MAX_INTS];
    double f[PG_MAX_FLOATS];
} pg_instruction;

typedef struct pg_handle pg_handle;
typedef struct pg_program pg_program;

PG_EXPORT int pg_abi(void);
PG_EXPORT const char* pg_last_error(void);

PG_EXPORT int pg_isa_count(void);
PG_EXPORT const char* pg_isa_name(int index);     // worst first
PG_EXPORT int pg_isa_supported(int index);        // 1 when this machine can run it

PG_EXPORT int pg_op_count(void);
PG_EXPORT const char* pg_op_name(int opcode);
PG_EXPORT int pg_op_tensors(int opcode);

// isa NULL: the best supported. cpu_ids NULL: threads are not pinned; else thread i > 0 runs on cpu_ids[i].
PG_EXPORT pg_handle* pg_open(const char* isa, int num_threads, const int* cpu_ids);
PG_EXPORT void pg_close(pg_handle* handle);
PG_EXPORT int pg_set_isa(pg_handle* handle, const char* isa);
PG_EXPORT int pg_set_threads(pg_handle* handle, int num_threads, const int* cpu_ids);
PG_EXPORT const char* pg_isa(pg_handle* handle);
PG_EXPORT int pg_num_threads(pg_handle* handle);

// Whether the operands of an op have the right types and shapes.
PG_EXPORT int pg_check_op(pg_handle* handle, const pg_instruction* instruction);
// Runs one op now; `instruction->barrier` and the symbols are ignored.
PG_EXPORT int pg_run_op(pg_handle* handle, const pg_instruction* instruction);

// A recorded program keeps copies of the instructions, not of the memory they point to. A row of T, S or R may be zero.
PG_EXPORT pg_program* pg_program_create(pg_handle* handle, const pg_instruction* code, int64_t num_instructions);
// Runs it. Inputs that were declared are copied from where they are staged to where the instructions read them, first.
PG_EXPORT int pg_program_run(pg_program* program, int64_t T, int64_t S, int64_t R);
// An input: `rows of symbol + more` rows of `row_bytes`. To be declared before the first run.
PG_EXPORT void pg_program_feed(pg_program* program, void* live, const void* staged, int64_t row_bytes, int32_t symbol, int64_t more);
// Before each run tokens[i] becomes drawn[source[i]] (0 if that is negative) wherever source[i] >= 0: rows of what the run before drew. All live.
PG_EXPORT void pg_program_follow(pg_program* program, int32_t* tokens, const int32_t* source, const int32_t* drawn);
// The same in two halves, so that the next run can be prepared and started while one is under way; at most two are. What is staged
// may be changed as soon as start returns. join waits for the oldest, and copies what it drew (R rows) and how long it took.
PG_EXPORT int pg_program_start(pg_program* program, int64_t T, int64_t S, int64_t R);
PG_EXPORT int pg_program_join(pg_program* program, int32_t* drawn, int64_t* nanoseconds);
// What all runs so far took.
PG_EXPORT int64_t pg_program_nanoseconds(pg_program* program);
// Marks passed in the current or latest run; wait returns it once it is >= mark, or after the time is over.
PG_EXPORT int64_t pg_program_progress(pg_program* program);
PG_EXPORT int64_t pg_program_wait(pg_program* program, int64_t mark, int64_t timeout_us);
PG_EXPORT void pg_program_free(pg_program* program);
// With tracing on, a run notes when each of its stages began. The call copies the latest run's notes: nanoseconds of a
// monotonic clock and the instruction each stage begins with, at most `most` of them; a last entry, instruction -1, is the
// end of the run. Returns how many there are.
PG_EXPORT void pg_program_trace(pg_program* program, int on);
PG_EXPORT int64_t pg_program_times(pg_program* program, int64_t* nanoseconds, int32_t* instructions, int64_t most);

#ifdef __cplusplus
}
#endif
