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

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Lanes __attribute__((vector_size(kBytes)));   // a register, or what the loops below keep would not fit

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
#pragma GCC unroll 32
              for (int k = 0; k < 512 / kBytes; ++k) sum[k % 8] += *(const Lanes*)(p + at + size_t(kBytes * k));
#pragma GCC unroll 8
        for (int k = 1; k < 8; ++k) sum[0] += sum[k];
        sink = sum[0][0];
        return double(bytes / 512 * 512 * times);
    });
}

// Operations a second of a loop of `step(x)` over twelve independent chains, each step being `operations`.
template <class Vector, class Step>
double chain_rate(int threads, Vector start, double operations, Step step) {
    return best_rate(threads, [=](int, bool) {
        Vector acc[12];
#pragma GCC unroll 12
        for (auto& x : acc) x = start;
        constexpr int kSteps = 20000;
        for (int i = 0; i < kSteps; ++i)
#pragma GCC unroll 12
            for (auto& x : acc) {
                x = step(x);
                asm volatile("" : "+v"(x));
            }
#pragma GCC unroll 12
        for (auto& x : acc) sink = float(((Lanes)x)[0]);
        return operations * 12 * kSteps;
    });
}

double fma_rate(int threads) {
    const Lanes a = Lanes{} + 1.0f, b = Lanes{} + 1e-9f;
    return chain_rate(threads, Lanes{}, 2.0 * kBytes / 4, [=](Lanes x) { return x * a + b; });
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
double bf16_rate(int threads) {
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f803f80);
    return chain_rate(threads, _mm512_setzero_ps(), 4.0 * 16, [=](__m512 x) { return _mm512_dpbf16_ps(x, a, a); });
}
double int16_rate(int threads) {
    const __m512i a = _mm512_set1_epi16(3);
    return chain_rate(threads, _mm512_setzero_si512(), 4.0 * 16, [=](__m512i x) { return _mm512_dpwssd_epi32(x, a, a); });
}
double int8_rate(int threads) {
    const __m512i a = _mm512_set1_epi8(3);
    return chain_rate(threads, _mm512_setzero_si512(), 8.0 * 16, [=](__m512i x) { return _mm512_dpbusd_epi32(x, a, a); });
}
#elif defined(__AVX2__)
// There is no one instruction: 16-bit products and a sum; 4-bit weights have eight products of bytes summed in 16 bits before they are widened.
double int16_rate(int threads) {
    const __m256i a = _mm256_set1_epi16(3);
    return chain_rate(threads, _mm256_setzero_si256(), 4.0 * 8, [=](__m256i x) {
        __m256i y = a;
        asm volatile("" : "+v"(y));   // or the product would be computed once
        return _mm256_add_epi32(x, _mm256_madd_epi16(y, a));
    });
}
double int4_rate(int threads) {
    const __m256i a = _mm256_set1_epi8(3), one = _mm256_set1_epi16(1);
    return chain_rate(threads, _mm256_setzero_si256(), 8.0 * 8 * 8, [=](__m256i x) {
        __m256i y = a, sum = _mm256_maddubs_epi16(y, a);
#pragma GCC unroll 7
        for (int k = 0; k < 7; ++k) {
            asm volatile("" : "+v"(y));
            sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(y, a));
        }
        return _mm256_add_epi32(x, _mm256_madd_epi16(sum, one));
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
    printf("int8 %.0f GOP/s\n", int8_rate(threads) / 1e9);
#elif defined(__AVX2__)
    printf("int16 %.0f GOP/s\n", int16_rate(threads) / 1e9);
    printf("int4 %.0f GOP/s\n", int4_rate(threads) / 1e9);
#endif
    printf("L1 %.0f GB/s\n", read_rate(threads, 32u << 10) / 1e9);
    printf("L2 %.0f GB/s\n", read_rate(threads, 512u << 10) / 1e9);
    printf("L3 %.0f GB/s\n", read_rate(threads, size_t(8) << 20) / 1e9);
    printf("memory %.0f GB/s\n", read_rate(threads, size_t(256) << 20) / 1e9);
}
