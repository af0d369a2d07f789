// Runs one op, or a recorded list of them in a single call. Knows ops, never models.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "call.h"
#include "feed.h"
#include "lane.h"
#include "threads.h"

namespace pg {

constexpr int kMaxPhases = 3;

struct FreeDeleter {
    void operator()(void* p) const;
};
using Bytes = std::unique_ptr<char, FreeDeleter>;
Bytes allocate(int64_t bytes);   // 64-byte aligned

int opcode_of_mark();

struct Progress {
    std::atomic<int64_t> marks{0};
};

// Instructions with everything that is fixed before the first run: checks done, scratch and tickets allocated.
class Sequence {
   public:
    // Returns an empty string, or what is wrong with which instruction.
    std::string load(const pg_instruction* code, int64_t count, const Op* ops, int num_threads);
    // Runs with the given rows on the pool. Returns an empty string or the first fault.
    std::string run(Pool& pool, const Op* ops, const int64_t rows_of[4], Progress* progress, const std::function<void()>* opened = nullptr);

    void trace(bool on) { tracing_ = on; }
    int64_t times(int64_t* nanoseconds, int32_t* instructions, int64_t most) const;

   private:
    // One phase of one instruction. Items of a stage may overlap in time; stages may not.
    struct Item {
        uint32_t instruction, phase;
    };

    void set_rows(const Op* ops, const int64_t rows_of[4]);
    static void job(void* self, int stage, int tid, int num_threads);
    void plan(const Op* ops, int num_threads);
    void step(int stage, int tid, int num_threads);

    std::vector<pg_instruction> code_;
    std::vector<Call> calls_;
    std::vector<Item> items_;            // of this run: phases depend on rows and on what operands hold
    int64_t rows_[4] = {0, 0, 0, 0};     // of the last run: most steps of a server have those of the one before
    bool has_rows_ = false;
    std::vector<uint32_t> stage_end_;    // stage s is items [stage_end[s - 1], stage_end[s])
    std::unique_ptr<std::atomic<int64_t>[]> tickets_;
    bool tracing_ = false;
    std::unique_ptr<std::atomic<int64_t>[]> began_;   // per stage, and the end of the run
    size_t num_began_ = 0;
    Bytes scratch_;
    int64_t scratch_bytes_ = 0;
    std::atomic<const char*> fault_{nullptr};
    const Op* ops_ = nullptr;
    Progress* progress_ = nullptr;
};

}  // namespace pg

struct pg_handle {
    pg_handle(int num_threads, const int* cpu_ids) : pool(new pg::Pool(num_threads, cpu_ids)) {}
    std::unique_ptr<pg::Pool> pool;
    const pg::Op* ops = nullptr;
    const char* isa = nullptr;
    std::mutex busy;
    pg::Sequence single;   // op by op
    std::unique_ptr<pg::Lane> lane;   // of runs that are started and joined; there from the first one on, last: its jobs use the above
};

constexpr int kMaxStarted = 2;

struct pg_program {
    pg_handle* handle;
    std::vector<pg_instruction> recorded;   // rows at their most
    pg::Sequence sequence;
    pg::Progress progress;
    int64_t most[4] = {0, 0, 0, 0};         // of each symbol; 0: not used
    pg::Feed feed;
    pg::Feed::Held held[kMaxStarted];       // run k is in held[k % kMaxStarted]
    int64_t num_started = 0, num_joined = 0;
    std::atomic<int64_t> nanoseconds{0};    // of all runs so far
    // What the sequence was loaded for: its scratch memory depends on both.
    const pg::Op* ops = nullptr;
    int num_threads = 0;
};
