#include "api.h"

#include <chrono>
#include <new>
#include <string.h>
#include <string>
#include <thread>

#include "ops.h"
#include "program.h"

namespace pg {
extern const Isa kIsaPortable;
#if defined(__x86_64__)
extern const Isa kIsaAvx2, kIsaAvx512, kIsaAvx512Vnni, kIsaAvx512Bf16;
#endif
}  // namespace pg

namespace {

thread_local std::string last_error;

int fail(std::string why) {
    last_error = std::move(why);
    return 1;
}

bool always() { return true; }

#if defined(__x86_64__)
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
[[maybe_unused]] bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
[[maybe_unused]] bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
// Intel's dot product of bfloat16 does half of what two multiply-adds of floats do in the same time, AMD's twice as much.
[[maybe_unused]] bool has_fast_bf16() { return has_avx512_bf16() && !__builtin_cpu_is("intel"); }
#endif

// `wanted`: chosen if none below it is.
struct Row {
    const pg::Isa* isa;
    bool (*supported)();
    bool (*wanted)();
};

const Row kIsas[] = {
    {&pg::kIsaPortable, always, always},
#if defined(__x86_64__)
#if PG_NUM_LEVELS >= 1   // build.py says how many there are
    {&pg::kIsaAvx2, has_avx2, has_avx2},
#endif
#if PG_NUM_LEVELS >= 2
    {&pg::kIsaAvx512, has_avx512, has_avx512},
#endif
#if PG_NUM_LEVELS >= 3
    {&pg::kIsaAvx512Vnni, has_avx512_vnni, has_avx512_vnni},
#endif
#if PG_NUM_LEVELS >= 4
    {&pg::kIsaAvx512Bf16, has_avx512_bf16, has_fast_bf16},
#endif
#endif
};
constexpr int kNumIsas = int(sizeof kIsas / sizeof kIsas[0]);

const pg::Isa* choose(const char* name) {
    for (int k = kNumIsas - 1; k >= 0; --k)
        if (name ? !strcmp(name, kIsas[k].isa->name) : kIsas[k].wanted()) {
            if (kIsas[k].supported()) return kIsas[k].isa;
            fail(std::string("this machine cannot run instruction set `") + name + "`");
            return nullptr;
        }
    fail(std::string("unknown instruction set `") + (name ? name : "") + "`");
    return nullptr;
}

const char* const kOpNames[] = {
#define PG_NAME(name, tensors, domain) #name,
    PG_OPS(PG_NAME)
#undef PG_NAME
};
const int kOpTensors[] = {
#define PG_COUNT(name, tensors, domain) tensors,
    PG_OPS(PG_COUNT)
#undef PG_COUNT
};
constexpr int kNumOps = int(sizeof kOpTensors / sizeof kOpTensors[0]);

}  // namespace

int pg_abi(void) { return 3; }
const char* pg_last_error(void) { return last_error.c_str(); }

int pg_isa_count(void) { return kNumIsas; }
const char* pg_isa_name(int k) { return k >= 0 && k < kNumIsas ? kIsas[k].isa->name : nullptr; }
int pg_isa_supported(int k) { return k >= 0 && k < kNumIsas && kIsas[k].supported(); }

int pg_op_count(void) { return kNumOps; }
const char* pg_op_name(int k) { return k >= 0 && k < kNumOps ? kOpNames[k] : nullptr; }
int pg_op_tensors(int k) { return k >= 0 && k < kNumOps ? kOpTensors[k] : -1; }

pg_handle* pg_open(const char* isa, int num_threads, const int* cpu_ids) {
    const pg::Isa* chosen = choose(isa);
    if (!chosen) return nullptr;
    try {
        auto* handle = new pg_handle(num_threads, cpu_ids);
        handle->ops = chosen->ops;
        handle->isa = chosen->name;
        return handle;
    } catch (const std::exception& e) {
        fail(std::string("cannot start ") + std::to_string(num_threads) + " threads: " + e.what());
        return nullptr;
    }
}

void pg_close(pg_handle* handle) { delete handle; }

int pg_set_isa(pg_handle* handle, const char* isa) {
    const pg::Isa* chosen = choose(isa);
    if (!chosen) return 1;
    std::lock_guard<std::mutex> lock(handle->busy);
    handle->ops = chosen->ops;
    handle->isa = chosen->name;
    return 0;
}

int pg_set_threads(pg_handle* handle, int num_threads, const int* cpu_ids) {
    try {
        auto pool = std::make_unique<pg::Pool>(num_threads, cpu_ids);
        std::lock_guard<std::mutex> lock(handle->busy);
        handle->pool.swap(pool);
        return 0;
    } catch (const std::exception& e) {
        return fail(std::string("cannot start ") + std::to_string(num_threads) + " threads: " + e.what());
    }
}

const char* pg_isa(pg_handle* handle) { return handle->isa; }
int pg_num_threads(pg_handle* handle) { return handle->pool->size(); }

int pg_run_op(pg_handle* handle, const pg_instruction* instruction) {
    try {
        std::lock_guard<std::mutex> lock(handle->busy);
        if (instruction->opcode == pg::opcode_of_mark()) return fail("a mark has a meaning in a program only");
        std::string wrong = handle->single.load(instruction, 1, handle->ops, handle->pool->size());
        if (wrong.empty()) wrong = handle->single.run(*handle->pool, handle->ops, nullptr, nullptr);
        return wrong.empty() ? 0 : fail(wrong);
    } catch (const std::exception& e) {
        return fail(e.what());
    }
}

int pg_check_op(pg_handle* handle, const pg_instruction* in) {
    if (in->opcode < 0 || in->opcode >= kNumOps) return fail("unknown opcode " + std::to_string(in->opcode));
    const char* wrong = handle->ops[in->opcode].check(pg::Call{in->t, in->i, in->f, nullptr, nullptr, nullptr, 0});
    return wrong ? fail(wrong) : 0;
}

namespace {

std::string load(pg_program* program) {
    pg_handle* handle = program->handle;
    if (program->ops == handle->ops && program->num_threads == handle->pool->size()) return {};
    program->ops = handle->ops;
    program->num_threads = handle->pool->size();
    return program->sequence.load(program->recorded.data(), int64_t(program->recorded.size()), program->ops, program->num_threads);
}

}  // namespace

pg_program* pg_program_create(pg_handle* handle, const pg_instruction* code, int64_t count) {
    try {
        auto program = std::make_unique<pg_program>();
        program->handle = handle;
        program->recorded.assign(code, code + count);
        std::lock_guard<std::mutex> lock(handle->busy);
        std::string wrong = load(program.get());
        if (!wrong.empty()) {
            fail(wrong);
            return nullptr;
        }
        for (const pg_instruction& in : program->recorded)
            for (const pg_tensor& t : in.t)
                if (t.symbol != PG_FIXED) {
                    int64_t& most = program->most[t.symbol];
                    most = most == 0 || t.rows < most ? t.rows : most;
                }
        return program.release();
    } catch (const std::exception& e) {
        fail(e.what());
        return nullptr;
    }
}

namespace {

// Empty, or what is wrong with the number of rows asked for.
std::string check_rows(const pg_program* program, const int64_t rows_of[4]) {
    for (int k = PG_T; k <= PG_R; ++k)
        if (rows_of[k] < 0 || (program->most[k] && rows_of[k] > program->most[k]))
            return "rows " + std::to_string(rows_of[k]) + " of symbol " + "?TSR"[k] + " are outside 0.." + std::to_string(program->most[k]);
    return {};
}

// The run that `held` describes, from its inputs to what it drew.
void run_now(pg_program* program, pg::Feed::Held& held, const pg::Lane::Begun* begun_to_work = nullptr) {
    try {
        std::lock_guard<std::mutex> lock(program->handle->busy);
        auto begun = std::chrono::steady_clock::now();
        program->progress.marks.store(0);
        held.wrong = load(program);
        if (held.wrong.empty()) {
            program->feed.begin(held);
            held.wrong = program->sequence.run(*program->handle->pool, program->ops, held.rows, &program->progress, begun_to_work);
            program->feed.end(held);
        }
        held.nanoseconds = std::chrono::nanoseconds(std::chrono::steady_clock::now() - begun).count();
        program->nanoseconds.fetch_add(held.nanoseconds);
    } catch (const std::exception& e) {
        held.wrong = e.what();
    }
}

// Takes a place for a run and copies its inputs. Null, with the error told, if that cannot be.
pg::Feed::Held* hold(pg_program* program, const int64_t rows_of[4]) {
    std::string wrong = check_rows(program, rows_of);
    if (wrong.empty() && program->num_started - program->num_joined == kMaxStarted) wrong = "two runs are under way; join one first";
    if (!wrong.empty()) {
        fail(wrong);
        return nullptr;
    }
    pg::Feed::Held& held = program->held[program->num_started % kMaxStarted];
    program->feed.hold(held, rows_of);
    held.ticket = 0;
    ++program->num_started;
    return &held;
}

}  // namespace

void pg_program_feed(pg_program* program, void* live, const void* staged, int64_t row_bytes, int32_t symbol, int64_t more) {
    program->feed.add(live, staged, row_bytes, symbol, more);
}

void pg_program_follow(pg_program* program, int32_t* tokens, const int32_t* source, const int32_t* drawn) {
    program->feed.follow(tokens, source, drawn);
}

int pg_program_run(pg_program* program, int64_t T, int64_t S, int64_t R) {
    const int64_t rows_of[4] = {0, T, S, R};
    if (program->num_started != program->num_joined) return fail("a run is under way; join it first");
    try {
        pg::Feed::Held* held = hold(program, rows_of);
        if (!held) return 1;
        run_now(program, *held);
        return pg_program_join(program, nullptr, nullptr);
    } catch (const std::exception& e) {
        return fail(e.what());
    }
}

int pg_program_start(pg_program* program, int64_t T, int64_t S, int64_t R) {
    const int64_t rows_of[4] = {0, T, S, R};
    try {
        if (!program->handle->lane) program->handle->lane = std::make_unique<pg::Lane>();
        pg::Feed::Held* held = hold(program, rows_of);
        if (!held) return 1;
        held->ticket = program->handle->lane->push([program, held](const pg::Lane::Begun& begun) { run_now(program, *held, &begun); });
        return 0;
    } catch (const std::exception& e) {
        return fail(e.what());
    }
}

int pg_program_join(pg_program* program, int32_t* drawn, int64_t* nanoseconds) {
    if (program->num_started == program->num_joined) return fail("no run is under way");
    pg::Feed::Held& held = program->held[program->num_joined % kMaxStarted];
    if (held.ticket) program->handle->lane->wait(held.ticket);
    ++program->num_joined;
    if (nanoseconds) *nanoseconds = held.nanoseconds;
    if (!held.wrong.empty()) return fail(held.wrong);
    if (drawn && !held.drawn.empty()) memcpy(drawn, held.drawn.data(), held.drawn.size() * sizeof(int32_t));
    return 0;
}

int64_t pg_program_nanoseconds(pg_program* program) { return program->nanoseconds.load(); }

void pg_program_trace(pg_program* program, int on) { program->sequence.trace(on != 0); }

int64_t pg_program_times(pg_program* program, int64_t* nanoseconds, int32_t* instructions, int64_t most) {
    std::lock_guard<std::mutex> lock(program->handle->busy);
    return program->sequence.times(nanoseconds, instructions, most);
}

int64_t pg_program_progress(pg_program* program) { return program->progress.marks.load(); }

int64_t pg_program_wait(pg_program* program, int64_t mark, int64_t timeout_us) {
    auto deadline = std::chrono::steady_clock::now() + std::chrono::microseconds(timeout_us);
    int64_t passed;
    while ((passed = program->progress.marks.load()) < mark && std::chrono::steady_clock::now() < deadline)
        std::this_thread::sleep_for(std::chrono::microseconds(50));
    return passed;
}

void pg_program_free(pg_program* program) {
    if (program->num_started != program->num_joined) program->handle->lane->wait_for_all();
    delete program;
}
