// e(T) of each dialogue of a ragged batch: its mean (or last) token, then as a unit vector:
//     ragged_mean:  mean[b] = sum_i x_i / n_b        ragged_last:  last[b] = the dialogue's last row
//     normalise:    out[i]  = x_i / |x_i|, 0 where |x_i| is 0
// An empty dialogue gives 0. NaN and infinity go through.
//
// Traffic: ragged_mean x once and the means written; ragged_last one row a dialogue; normalise its rows twice, which
// are few.
//
// A block takes 128 bytes of every row of a dialogue, so that one dialogue of d = 576 keeps 18 blocks busy; a block a
// dialogue, or a thread a column over all rows, would leave most of the device idle at the usual batch of one.
#include "warp.cuh"

#define SECTION 8  // lanes that read 128 bytes of a row side by side
#define ROWS (LANES / SECTION)

// Grid: (b, ceil(d / columns)), columns = 128 / sizeof(T): a block takes 128 bytes of every row of a dialogue.
template <class T>
__device__ __forceinline__ void ragged_mean(const T* x, const long long* offsets, float* mean, int d) {
    constexpr int V = Vector<T>::size, COLUMNS = SECTION * V;
    __shared__ float partial[THREADS_MAX / LANES][COLUMNS];
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int place = lane % SECTION, start = blockIdx.y * COLUMNS;
    const long long first = offsets[blockIdx.x], last = offsets[blockIdx.x + 1];
    const bool vectors = aligned16(x) && d % V == 0;
    float sum[V] = {};
    long long row = first + warp * ROWS + lane / SECTION;
    if (vectors && start + place * V < d) {
        #pragma unroll 4
        for (; row < last; row += warps * ROWS) {
            float values[V];
            load16(x + row * d + start + place * V, values);
            #pragma unroll
            for (int k = 0; k < V; k++) sum[k] += values[k];
        }
    } else if (!vectors) {
        #pragma unroll 1
        for (; row < last; row += warps * ROWS)
            #pragma unroll
            for (int k = 0; k < V; k++)
                if (start + k * SECTION + place < d) sum[k] += widen(x[row * d + start + k * SECTION + place]);
    }
    #pragma unroll
    for (int k = 0; k < V; k++) {
        #pragma unroll
        for (int step = SECTION; step < LANES; step *= 2) sum[k] += __shfl_xor_sync(ALL_LANES, sum[k], step);
        if (lane < SECTION) partial[warp][vectors ? place * V + k : k * SECTION + place] = sum[k];
    }
    __syncthreads();
    const int column = threadIdx.x;
    if (column >= COLUMNS || start + column >= d) return;
    float total = 0.f;
    #pragma unroll 1
    for (int w = 0; w < warps; w++) total += partial[w][column];
    mean[(long long)blockIdx.x * d + start + column] = last > first ? total / (float)(last - first) : 0.f;
}

// Grid: (b, any).
template <class T>
__device__ __forceinline__ void ragged_last(const T* x, const long long* offsets, float* out, int d) {
    const long long first = offsets[blockIdx.x], last = offsets[blockIdx.x + 1];
    #pragma unroll 2
    for (int j = blockIdx.y * blockDim.x + threadIdx.x; j < d; j += gridDim.y * blockDim.x)
        out[(long long)blockIdx.x * d + j] = last > first ? widen(x[(last - 1) * d + j]) : 0.f;
}

#ifndef ONLY_FUNCTIONS
// Grid: a warp per row.
extern "C" __global__ void __launch_bounds__(THREADS_MAX)
normalise_f32(const float* __restrict__ x, float* __restrict__ out, long long n, int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (row >= n) return;
    float energy = 0.f;
    #pragma unroll 2
    for (int j = lane; j < d; j += LANES) energy = fmaf(x[row * d + j], x[row * d + j], energy);
    energy = warp_sum(energy);
    const float scale = energy == 0.f ? 1.f : 1.f / sqrtf(energy);
    #pragma unroll 2
    for (int j = lane; j < d; j += LANES) out[row * d + j] = scale * x[row * d + j];
}

#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    ragged_mean_##NAME(const T* __restrict__ x, const long long* __restrict__ offsets,                       \
                       float* __restrict__ mean, int d) {                                                    \
        ragged_mean(x, offsets, mean, d);                                                                    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    ragged_last_##NAME(const T* __restrict__ x, const long long* __restrict__ offsets,                       \
                       float* __restrict__ last, int d) {                                                    \
        ragged_last(x, offsets, last, d);                                                                    \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
