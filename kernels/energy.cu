// Energy of each token, and of each token less its dialogue's mean:
//     token_energy:     energy[i] = sum_j x_ij^2
//     centered_energy:  energy[i] = sum_j (x_ij - mean_bj)^2,  b the dialogue of row i
#include "energy.cuh"

// Grid: a warp per row, ceil(n / warps of a block) blocks.
template <class T>
__device__ __forceinline__ void token_energy(const T* x, float* energy, long long n, int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
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
