// Lets g++ compile a kernel's source for the host: every CUDA thread is a thread of the system, blocks run one after
// the other. For ThreadSanitizer (races) and AddressSanitizer (bounds); a test tool, never a device.
//
// Shuffles are among whole warps only. A barrier that some threads of the block never reach ends the program.
#pragma once
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define CUDA_ON_CPU
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

namespace cuda_on_cpu {

constexpr unsigned LANES_OF_WARP = 32;

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
    std::_Exit(70);
}

struct Released {
    std::atomic<unsigned>* waiting;
    void operator()() noexcept { *waiting = 0; }
};

// One value of each lane; two sets in turn, so that one barrier a shuffle is enough.
struct Warp {
    std::barrier<> barrier{LANES_OF_WARP};
    uint32_t values[2][LANES_OF_WARP];
};

inline dim3 grid, block, block_index;
inline std::unique_ptr<std::barrier<Released>> block_barrier;
inline std::vector<std::unique_ptr<Warp>> warps;
inline std::atomic<unsigned> waiting, left;
inline thread_local dim3 thread_index;
inline thread_local unsigned shuffles;

inline void sync_block() {
    if (left) fail("a barrier after threads of the block have left");
    waiting++;
    block_barrier->arrive_and_wait();
}

template <class Value> Value exchange(unsigned mask, Value value, unsigned lane_xor) {
    static_assert(sizeof(Value) == 4);
    if (mask != 0xffffffffu) fail("a shuffle among fewer lanes than 32");
    const unsigned lane = thread_index.x % LANES_OF_WARP;
    Warp& warp = *warps[thread_index.x / LANES_OF_WARP];
    uint32_t* values = warp.values[shuffles++ % 2];
    std::memcpy(&values[lane], &value, 4);
    warp.barrier.arrive_and_wait();
    std::memcpy(&value, &values[(lane ^ lane_xor) % LANES_OF_WARP], 4);
    return value;
}

inline void launch(dim3 blocks, unsigned threads, const std::function<void()>& kernel) {
    grid = blocks;
    block = {threads};
    warps.clear();
    for (unsigned i = 0; i < threads; i += LANES_OF_WARP) warps.push_back(std::make_unique<Warp>());
    block_barrier = std::make_unique<std::barrier<Released>>(threads, Released{&waiting});
    std::barrier<> between(threads);
    std::vector<std::thread> pool;
    for (unsigned t = 0; t < threads; t++)
        pool.emplace_back([&, t] {
            thread_index = {t, 0, 0};
            shuffles = 0;
            for (unsigned y = 0; y < blocks.y; y++)
                for (unsigned x = 0; x < blocks.x; x++) {
                    if (t == 0) block_index = {x, y, 0}, left = 0, waiting = 0;
                    between.arrive_and_wait();
                    kernel();
                    if (waiting) fail("a thread leaves while others of its block wait at a barrier");
                    left++;
                    between.arrive_and_wait();
                }
        });
    for (auto& thread : pool) thread.join();
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::thread_index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block)
#define gridDim (cuda_on_cpu::grid)

inline void __syncthreads() { cuda_on_cpu::sync_block(); }
template <class Value> Value __shfl_xor_sync(unsigned mask, Value value, int by) {
    return cuda_on_cpu::exchange(mask, value, by);
}
inline int __reduce_max_sync(unsigned mask, int value) {
    for (int by = 16; by > 0; by /= 2) {
        const int other = cuda_on_cpu::exchange(mask, value, by);
        value = other > value ? other : value;
    }
    return value;
}

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { return __uint_as_float((unsigned)bits); }
inline int __float_as_int(float x) { return (int)__float_as_uint(x); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }

// What the kernels do by a single instruction.
inline float half_to_float(unsigned short bits) {
    const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) return std::copysign(std::ldexp((float)fraction, -24), __uint_as_float(sign | 0x3f800000u));
    return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
}
inline void halves_to_floats(unsigned pair, float& low, float& high) {
    low = half_to_float(pair & 0xffff);
    high = half_to_float(pair >> 16);
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fmaxf(a, b); }
