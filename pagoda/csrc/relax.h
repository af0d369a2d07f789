// Waiting without sleeping: spin, then offer the core to others.
#pragma once
#include <thread>

namespace pg {

constexpr int kIdleSpins = 4000;    // between two runs
constexpr int kIdleYields = 2000;   // about a millisecond

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// True as soon as `changed` says so; false when patience is at its end.
template <class Changed>
inline bool await_change(Changed changed, int spins, int yields) {
    for (int i = 0; i < spins; ++i) {
        if (changed()) return true;
        relax();
    }
    for (int i = 0; i < yields; ++i) {   // others may have the core meanwhile
        if (changed()) return true;
        std::this_thread::yield();
        for (int k = 0; k < 8; ++k) relax();
    }
    return false;
}

}  // namespace pg
