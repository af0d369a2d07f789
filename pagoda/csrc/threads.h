// A pool of threads that meet at barriers. Waiting spins for some microseconds, which is longer than a barrier takes
// when all cores are ours, and then sleeps, so that a busy neighbour costs its share of the core and no more.
#pragma once
#include <atomic>
#include <stdint.h>
#include <thread>
#include <vector>

namespace pg {

class Pool {
   public:
    using Job = void (*)(void* context, int tid, int num_threads);

    Pool(int num_threads, const int* cpu_ids);
    ~Pool();
    Pool(const Pool&) = delete;

    int size() const { return num_threads_; }
    void run(Job job, void* context);   // on all threads, the caller being thread 0; returns when all are done
    void barrier();                     // from inside a job, by every thread

   private:
    struct alignas(64) Word {
        std::atomic<uint32_t> value{0};
        std::atomic<uint32_t> sleepers{0};
        void set(uint32_t to);
        void wait_while(uint32_t old, int spins);
    };

    void work(int tid);

    int num_threads_;
    Job job_ = nullptr;
    void* context_ = nullptr;
    std::atomic<bool> closing_{false};
    Word round_;                                  // which job the workers should be in
    Word phase_;                                  // which barrier was passed
    alignas(64) std::atomic<uint32_t> arrived_{0};
    std::vector<std::thread> workers_;
};

}  // namespace pg
