#include "lane.h"

#include "relax.h"

namespace pg {

Lane::~Lane() {
    {
        std::lock_guard<std::mutex> hold(lock_);
        closing_ = true;
    }
    pushed_.fetch_add(1);   // unlike what the thread has seen
    came_.notify_all();
    thread_.join();
}

int64_t Lane::push(Job job) {
    int64_t ticket;
    {
        std::lock_guard<std::mutex> hold(lock_);
        jobs_.push_back(std::move(job));
        ticket = pushed_.fetch_add(1) + 1;
    }
    came_.notify_one();
    return ticket;
}

void Lane::wait(int64_t ticket) {
    std::unique_lock<std::mutex> hold(lock_);
    went_.wait(hold, [&] { return done_ >= ticket; });
}

// Jobs up to this ticket are over.
void Lane::tell(int64_t done) {
    {
        std::lock_guard<std::mutex> hold(lock_);
        if (done_ >= done) return;
        done_ = done;
    }
    went_.notify_all();
}

void Lane::work() {
    for (int64_t taken = 0;;) {
        Job job;
        {
            std::unique_lock<std::mutex> hold(lock_);
            if (jobs_.empty()) {
                hold.unlock();
                tell(taken);
                await_change([&] { return pushed_.load(std::memory_order_acquire) != taken; }, kIdleSpins, kIdleYields);
                hold.lock();
                came_.wait(hold, [&] { return closing_ || !jobs_.empty(); });
                if (jobs_.empty()) return;
            }
            job = std::move(jobs_.front());
            jobs_.pop_front();
        }
        job([&] { tell(taken); });
        ++taken;
    }
}

}  // namespace pg
