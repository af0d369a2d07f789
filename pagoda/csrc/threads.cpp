#include "threads.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace pg {
namespace {

constexpr int kBarrierSpins = 2000;
constexpr int kIdleSpins = 4000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void pin([[maybe_unused]] int cpu) {
#if defined(__linux__)
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // a cpu we may not use leaves the thread unpinned
#endif
}

}  // namespace

void Pool::Word::set(uint32_t to) {
    value.store(to, std::memory_order_seq_cst);
    if (sleepers.load(std::memory_order_seq_cst) > 0) value.notify_all();
}

void Pool::Word::wait_while(uint32_t old, int spins) {
    for (int i = 0; i < spins; ++i) {
        if (value.load(std::memory_order_acquire) != old) return;
        relax();
    }
    sleepers.fetch_add(1, std::memory_order_seq_cst);
    value.wait(old, std::memory_order_seq_cst);
    sleepers.fetch_sub(1, std::memory_order_relaxed);
}

Pool::Pool(int num_threads, const int* cpu_ids) : num_threads_(num_threads < 1 ? 1 : num_threads) {
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
    round_.set(round_.value.load() + 1);
    for (auto& worker : workers_) worker.join();
}

void Pool::work(int tid) {
    for (uint32_t seen = 0;;) {
        round_.wait_while(seen, kIdleSpins);
        ++seen;
        if (closing_.load()) return;
        job_(context_, tid, num_threads_);
        barrier();
    }
}

void Pool::run(Job job, void* context) {
    if (num_threads_ == 1) return job(context, 0, 1);
    job_ = job;
    context_ = context;
    round_.set(round_.value.load(std::memory_order_relaxed) + 1);
    job(context, 0, num_threads_);
    barrier();
}

void Pool::barrier() {
    if (num_threads_ == 1) return;
    uint32_t passed = phase_.value.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == uint32_t(num_threads_)) {
        arrived_.store(0, std::memory_order_relaxed);
        phase_.set(passed + 1);
    } else {
        phase_.wait_while(passed, kBarrierSpins);
    }
}

}  // namespace pg
