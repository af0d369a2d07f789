#include "threads.h"

#include "call.h"
#include "relax.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#include <unistd.h>
#endif

namespace pg {
namespace {

constexpr int kStageSpins = 2000;

void pin([[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a cpu we may not use leaves the thread unpinned
#endif
}

}  // namespace

Pool::Pool(int num_threads, const int* cpu_ids) : num_threads_(num_threads < 1 ? 1 : num_threads) {
    state_.store(pack({0, 0, true}));
    for (int tid = 1; tid < num_threads_; ++tid) {
        int cpu = cpu_ids ? cpu_ids[tid] : -1;
        workers_.emplace_back([this, tid, cpu] {
            if (cpu >= 0) pin(cpu);
            work(tid);
        });
    }
}

Pool::~Pool() {
    closing_.store(true);
    state_.store(pack({~0u, 0, true}));   // unlike whatever anybody waits on
    announce();
    for (auto& worker : workers_) worker.join();
}

void Pool::work(int tid) {
    for (int spins = kIdleSpins;;) {
        uint32_t stage;
        uint64_t seen;
        if (closing_.load()) return;
        if (enter(&stage, &seen)) {
            job_(context_, int(stage), tid, num_threads_);
            leave();
            spins = kStageSpins;
        } else {
            wait_for_change(seen, spins, kIdleYields);
            spins = kIdleSpins;
        }
    }
}

void Pool::run(Job job, void* context, int num_stages, const std::function<void()>* opened) {
    if (num_threads_ == 1 || num_stages == 0) {
        if (opened) (*opened)();
        for (int stage = 0; stage < num_stages; ++stage) job(context, stage, 0, 1);
        return;
    }
    job_ = job;
    context_ = context;
    num_stages_ = uint32_t(num_stages);
    state_.store(pack({0, 0, false}), std::memory_order_release);
    announce();
    if (opened) (*opened)();
    for (;;) {
        uint32_t stage;
        uint64_t seen;
        while (!enter(&stage, &seen)) {
            if (unpack(seen).stage == num_stages_) return;
            wait_for_change(seen, kStageSpins, 0);
        }
        job(context, int(stage), 0, num_threads_);
        leave();
    }
}

// True with the open stage; false with the state that was found closed.
bool Pool::enter(uint32_t* stage, uint64_t* seen) {
    uint64_t v = state_.load(std::memory_order_acquire);
    for (;;) {
        State s = unpack(v);
        if (s.closed) {
            *seen = v;
            return false;
        }
        if (state_.compare_exchange_weak(v, pack({s.stage, s.inside + 1, false}), std::memory_order_acquire)) {
            *stage = s.stage;
            return true;
        }
    }
}

// A thread leaves when nothing is left to take, so whoever leaves first closes the stage.
void Pool::leave() {
    uint64_t v = state_.load(std::memory_order_relaxed);
    State to;
    do {
        State s = unpack(v);
        to = s.inside > 1 ? State{s.stage, s.inside - 1, true} : State{s.stage + 1, 0, s.stage + 1 == num_stages_};
    } while (!state_.compare_exchange_weak(v, pack(to), std::memory_order_acq_rel));
    if (to.inside == 0) announce();
}

void Pool::wait_for_change(uint64_t seen, int spins, int yields) {
    if (await_change([&] { return state_.load(std::memory_order_acquire) != seen; }, spins, yields)) return;
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    uint32_t changes = changes_.load(std::memory_order_seq_cst);
    // whoever closes the pool says so before it announces: a thread that missed it must not sleep on the state it is closed with
    if (state_.load(std::memory_order_seq_cst) == seen && !closing_.load(std::memory_order_seq_cst)) changes_.wait(changes, std::memory_order_seq_cst);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
}

// After every change of state_ that somebody may be waiting for.
void Pool::announce() {
    changes_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) changes_.notify_all();
}

int64_t last_level_bytes() {
    static const int64_t bytes = [] {
#if defined(_SC_LEVEL3_CACHE_SIZE)
        const long found = sysconf(_SC_LEVEL3_CACHE_SIZE);
        if (found > 0) return int64_t(found);
#endif
        return int64_t(8) << 20;
    }();
    return bytes;
}

}  // namespace pg
