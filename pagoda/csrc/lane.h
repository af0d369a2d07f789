// One thread that runs jobs in the order in which they were asked for, so that whoever asks can prepare the next meanwhile.
//
//     push     -> ticket 1, 2, 3 ...; the job runs once all before it have
//     wait     until the job of that ticket has run
//
// A job that has ended is told of only when the next one has begun: whoever wakes then is likely to be given this thread's core, and
// the other threads should have work by that time. So a job calls what it is given as soon as others can work on it.
//
// Between two jobs the thread spins and then offers its core for about a millisecond, as the pool's threads do: the next one
// usually comes sooner, and waking a sleeper costs the waker 20 to 50 us. Whoever waits for a job sleeps at once: its core is needed.
#pragma once
#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <stdint.h>
#include <thread>

namespace pg {

class Lane {
   public:
    using Begun = std::function<void()>;
    using Job = std::function<void(const Begun&)>;

    Lane() : thread_([this] { work(); }) {}
    ~Lane();
    Lane(const Lane&) = delete;

    int64_t push(Job job);
    void wait(int64_t ticket);
    // Everything asked for so far.
    void wait_for_all() { wait(pushed_.load()); }

   private:
    void work();
    void tell(int64_t done);

    std::mutex lock_;
    std::condition_variable came_, went_;
    std::deque<Job> jobs_;
    std::atomic<int64_t> pushed_{0};
    int64_t done_ = 0;
    bool closing_ = false;
    std::thread thread_;   // last: it uses all of the above
};

}  // namespace pg
