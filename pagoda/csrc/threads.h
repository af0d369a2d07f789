// A pool of threads that work through stages.
//
// The work of a stage is handed out by tickets, so any thread, or one alone, can do all of it. A stage is over when
// its tickets are gone and nobody is inside any more; nobody waits for a thread that never came. So a thread that the
// system has taken off its core holds up at most the one piece of work it has in hand, and joins again wherever the
// others are by then. That is what a barrier of all threads gets wrong beside a busy neighbour.
//
//     state:  stage | closed | threads inside
//
//     run()    stage 0, open, nobody inside
//     enter()  open                 -> one more inside
//     leave()  somebody inside      -> one less, closed; the last one out opens the next stage
//
// Waiting spins for some microseconds, which is longer than a stage usually lasts, and then sleeps. Between two runs a thread
// also offers its core to others for about a millisecond before it sleeps: a server's next step comes sooner than that, and
// waking a sleeper costs the waker 20 to 50 us.
#pragma once
#include <atomic>
#include <functional>
#include <stdint.h>
#include <thread>
#include <vector>

namespace pg {

class Pool {
   public:
    // Does what is left of a stage and returns when none of it is left to take.
    using Job = void (*)(void* context, int stage, int tid, int num_threads);

    Pool(int num_threads, const int* cpu_ids);
    ~Pool();
    Pool(const Pool&) = delete;

    int size() const { return num_threads_; }
    // All stages, one after another; the caller is thread 0. Returns when the last one is over. `opened` is called, if given, when the
    // others can work and before the caller does: it may lose its core there without holding anybody up.
    void run(Job job, void* context, int num_stages, const std::function<void()>* opened = nullptr);

   private:
    struct State {
        uint32_t stage, inside;
        bool closed;
    };
    static uint64_t pack(State s) { return uint64_t(s.stage) << 32 | uint64_t(s.closed) << 31 | s.inside; }
    static State unpack(uint64_t v) { return {uint32_t(v >> 32), uint32_t(v) & 0x7fffffffu, bool(v >> 31 & 1)}; }

    void work(int tid);
    bool enter(uint32_t* stage, uint64_t* seen);
    void leave();
    void wait_for_change(uint64_t seen, int spins, int yields);
    void announce();

    int num_threads_;
    Job job_ = nullptr;
    void* context_ = nullptr;
    uint32_t num_stages_ = 0;
    alignas(64) std::atomic<uint64_t> state_;
    alignas(64) std::atomic<uint32_t> changes_{0};   // what sleepers watch: grows with every opened stage
    std::atomic<uint32_t> sleepers_{0};
    std::atomic<bool> closing_{false};
    std::vector<std::thread> workers_;
};

}  // namespace pg
