// IDD of each vector: its distance from the mean unit vector of its domain,
//     out[i] = 1 - v_i . mean[domain_i], clipped to [0, 1]; 1 where domain_i is -1 (no entry there yet)
// The rows of v are unit vectors already. NaN stays. A domain beyond the means is the caller's error.
//
// Traffic: v once; the means, a row a domain, from the caches. Both in 16-byte loads where both rows are aligned.
//
// Versions, in dynamic PTX instructions per float32 element at d = 576 / 768 / 2048 (PTX 9.0; see REPORT.md):
//   1  indexed loops unrolled by 4: 42 registers, most of the text never executed
//   2  unrolled by 2, the tail not                             7.8 / 6.2 / 3.8
//   3  running pointers                                        this file
#include "warp.cuh"

// Grid: a warp per row.
template <class T>
__device__ __forceinline__ void dissimilarity(const T* v, const float* means, const int* domain, float* out, int n,
                                              int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (row >= n) return;
    float cosine = 0.f;
    if (domain[row] >= 0) {
        read_rows(v + row * d, means + (long long)domain[row] * d, d, lane,
                  [&](float x, float mean) { cosine = fmaf(x, mean, cosine); });
        cosine = warp_sum(cosine);
    }
    if (lane == 0) out[row] = clip01(1.f - cosine);
}

#ifndef ONLY_FUNCTIONS
#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    dissimilarity_##NAME(const T* __restrict__ v, const float* __restrict__ means,                           \
                         const int* __restrict__ domain, float* __restrict__ out, int n, int d) {            \
        dissimilarity(v, means, domain, out, n, d);                                                          \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
