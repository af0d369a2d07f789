// What this machine can do at best: bytes read a second and multiply-adds a second, by all threads at once.
//
//     roofline THREADS  ->  one line "name value unit" each
//
// Reading walks a buffer per thread of the given size over and over; the arithmetic loops keep independent chains of
// vectors in registers. Built for the machine it runs on.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
typedef float Lanes __attribute__((vector_size(64)));

// The best rate, in units a second, of `work` (which returns its units) run by all threads for a while.
template <class Work>
double best_rate(int threads, Work work) {
    double best = 0;
    for (int round = 0; round < 5; ++round) {
        std::atomic<int> ready{0};
        std::vector<double> units(size_t(threads), 0.0), seconds(size_t(threads), 0.0);
        std::vector<std::thread> pool;
        for (int t = 0; t < threads; ++t)
            pool.emplace_back([&, t] {
                auto state = work(t, true);
                ++ready;
                while (ready < threads) {}
                auto start = Clock::now();
                for (double passed = 0; passed < 0.05; passed = std::chrono::duration<double>(Clock::now() - start).count())
                    units[size_t(t)] += work(t, false);
                seconds[size_t(t)] = std::chrono::duration<double>(Clock::now() - start).count();
                (void)state;
            });
        for (auto& thread : pool) thread.join();
        double sum = 0;
        for (int t = 0; t < threads; ++t) sum += units[size_t(t)] / seconds[size_t(t)];
        best = std::max(best, sum);
    }
    return best;
}

std::atomic<float> sink;

double read_rate(int threads, size_t bytes) {
    std::vector<std::vector<char>> buffers;
    for (int t = 0; t < threads; ++t) buffers.emplace_back(bytes + 64, char(1));
    return best_rate(threads, [&](int t, bool) {
        const char* p = (const char*)((uintptr_t(buffers[size_t(t)].data()) + 63) & ~uintptr_t(63));
        Lanes sum[8] = {};
        const size_t times = 1 + (size_t(1) << 20) / bytes;   // small buffers often enough that looking at the clock is nothing
        for (size_t walk = 0; walk < times; ++walk)
          for (size_t at = 0; at + 512 <= bytes; at += 512)
#pragma GCC unroll 8
              for (int k = 0; k < 8; ++k) sum[k] += *(const Lanes*)(p + at + 64 * size_t(k));
#pragma GCC unroll 8
        for (int k = 1; k < 8; ++k) sum[0] += sum[k];
        sink = sum[0][0];
        return double(bytes / 512 * 512 * times);
    });
}

double fma_rate(int threads) {
    return best_rate(threads, [](int t, bool) {
        Lanes acc[12], a = Lanes{} + (1.0f + float(t) * 1e-9f), b = Lanes{} + 1e-9f;
#pragma GCC unroll 12
        for (auto& x : acc) x = Lanes{};
        constexpr int kSteps = 20000;
        for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
            for (auto& x : acc) {
                x = x * a + b;
                asm volatile("" : "+v"(x));
            }
#pragma GCC unroll 12
        for (auto& x : acc) sink = x[0];
        return 2.0 * 16 * 12 * kSteps;
    });
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
double bf16_rate(int threads) {
    return best_rate(threads, [](int, bool) {
        __m512 acc[12];
        __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
#pragma GCC unroll 12
        for (auto& x : acc) x = _mm512_setzero_ps();
        constexpr int kSteps = 20000;
        for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
            for (auto& x : acc) {
                x = _mm512_dpbf16_ps(x, a, a);
                asm volatile("" : "+v"(x));
            }
#pragma GCC unroll 12
        for (auto& x : acc) sink = x[0];
        return 4.0 * 16 * 12 * kSteps;
    });
}

double int16_rate(int threads) {
    return best_rate(threads, [](int, bool) {
        __m512i acc[12], a = _mm512_set1_epi16(3);
#pragma GCC unroll 12
        for (auto& x : acc) x = _mm512_setzero_si512();
        constexpr int kSteps = 20000;
        for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
            for (auto& x : acc) {
                x = _mm512_dpwssd_epi32(x, a, a);
                asm volatile("" : "+v"(x));
            }
#pragma GCC unroll 12
        for (auto& x : acc) sink = float(_mm512_reduce_add_epi32(x));
        return 4.0 * 16 * 12 * kSteps;
    });
}
#endif

}  // namespace

int main(int argc, char** argv) {
    int threads = argc > 1 ? atoi(argv[1]) : 1;
    printf("fp32 %.0f GFLOP/s\n", fma_rate(threads) / 1e9);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    printf("bf16 %.0f GFLOP/s\n", bf16_rate(threads) / 1e9);
    printf("int16 %.0f GOP/s\n", int16_rate(threads) / 1e9);
#endif
    printf("L1 %.0f GB/s\n", read_rate(threads, 32u << 10) / 1e9);
    printf("L2 %.0f GB/s\n", read_rate(threads, 512u << 10) / 1e9);
    printf("L3 %.0f GB/s\n", read_rate(threads, size_t(8) << 20) / 1e9);
    printf("memory %.0f GB/s\n", read_rate(threads, size_t(256) << 20) / 1e9);
}
