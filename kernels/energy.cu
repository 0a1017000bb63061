// Energy of each token, and of each token less its dialogue's mean:
//     token_energy:     energy[i] = sum_j x_ij^2
//     centered_energy:  energy[i] = sum_j (x_ij - mean_bj)^2,  b the dialogue of row i
// NaN and infinity go through as in any sum.
//
// Traffic: x once; 4 bytes a row written. The means are read again for every row, from the caches.
//
// Versions, in dynamic PTX instructions per float32 element at d = 576 / 768 / 2048 (PTX 9.0; see REPORT.md):
//   token 1    indexed loops, unrolled by the compiler                       8.3 / 6.7 / 3.2
//   token 2    not unrolled, a part sum per tile (error 1.1e-6 -> 1.4e-7)    7.1 / 5.7 / 3.2
//   token 3    running pointers, head and tail in one step                   this file
//   centered 1 |x|^2 - 2 x.mean + |mean|^2: rejected, its error grows with the common part of the tokens (1e-4 where
//              that is 20 times the rest, against 1e-7; in NumPy's float32)
//   centered 2 (x - mean)^2                                                  this file
#include "energy.cuh"

// Grid: a warp per row, ceil(n / warps of a block) blocks.
template <class T>
__device__ __forceinline__ void token_energy(const T* x, float* energy, long long n, int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (row >= n) return;
    const float sum = energy_of(x + row * d, d, lane);
    if (lane == 0) energy[row] = sum;
}

// Grid: (b, any): the blocks of one column share the rows of one dialogue.
template <class T>
__device__ __forceinline__ void centered_energy(const T* x, const float* means, const long long* offsets,
                                                float* energy, int d) {
    const int lane = threadIdx.x % LANES, warps = blockDim.x / LANES, dialogue = blockIdx.x;
    const float* mean = means + (long long)dialogue * d;
    const long long last = offsets[dialogue + 1];
    long long row = offsets[dialogue] + (long long)blockIdx.y * warps + threadIdx.x / LANES;
    for (; row < last; row += (long long)gridDim.y * warps) {
        const float sum = energy_about(x + row * d, mean, d, lane);
        if (lane == 0) energy[row] = sum;
    }
}

#ifndef ONLY_FUNCTIONS
#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    token_energy_##NAME(const T* __restrict__ x, float* __restrict__ energy, long long n, int d) {           \
        token_energy(x, energy, n, d);                                                                       \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    centered_energy_##NAME(const T* __restrict__ x, const float* __restrict__ means,                         \
                           const long long* __restrict__ offsets, float* __restrict__ energy, int d) {       \
        centered_energy(x, means, offsets, energy, d);                                                       \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
