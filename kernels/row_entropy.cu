// Entropy of the softmax of each row of logits, in nats:
//     H = ln Z - S/Z,  Z = sum_j e^(x_j - m),  S = sum_j (x_j - m) e^(x_j - m),  m = max_j x_j
// A logit of -inf has no weight; all -inf, or d = 0, gives 0, as does d = 1. NaN or +inf gives NaN.
//
// Traffic: the logits once; 4 bytes a row written. Each lane keeps its own (m, Z, S), merged at the end, so a row of
// any length passes through registers once and there is no barrier.
//
// Versions, in dynamic PTX instructions per float32 element at d = 576 / 768 / 2048 (PTX 8.5; see REPORT.md):
//   0  m, Z and S rescaled for every value (trial)             143 at 768
//   1  rescaled for every tile of 16 values; logf             21.9 / 18.2 / 11.5
//   2  part sums per tile (error 1.5e-6 -> 4e-7 at 50257 logits), running pointers, two sums in one reduction
//                                                             19.3 (of nvcc)
//   3  the maximum by redux.sync, head and tail in one step   18.4 / 15.5 / 10.6
//   4  ln by one lg2.approx of the mantissa                   16.7 / 14.3 / 10.1, this file
#include "warp.cuh"

#define LOG2_E 1.4426950408889634f
#define LOWEST (-3.402823466e38f)
#define FLOOR (-87.f)  // e^FLOOR is the least normal float32: nothing beside the largest term, which is 1

struct Softmax {
    float m = LOWEST, z = 0.f, s = 0.f;

    __device__ __forceinline__ void rebase(float larger) {
        const float shift = fmaxf(m - larger, FLOOR), factor = exp2_fast(shift * LOG2_E);
        s = factor * fmaf(shift, z, s);
        z *= factor;
        m = larger;
    }

    template <int K> __device__ __forceinline__ void absorb(const float (&x)[K]) {
        float larger = m;
        #pragma unroll
        for (int k = 0; k < K; k++) larger = fmaxf(larger, x[k]);
        rebase(larger);
        float z_part = 0.f, s_part = 0.f;  // of a tile, which rounds less than one long sum
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const float shift = max_or_nan(x[k] - m, FLOOR), p = exp2_fast(shift * LOG2_E);
            z_part = k == 0 ? p : z_part + p;
            s_part = k == 0 ? shift * p : fmaf(shift, p, s_part);
        }
        z += z_part;
        s += s_part;
    }

    // In lane 0, the sums of the whole warp.
    __device__ __forceinline__ void merge_warp(int lane) {
        rebase(warp_max(m));
        warp_sum_to_lane0(z, s, lane);
    }

    // z >= 1, the largest term, unless every logit is -inf or there is none.
    __device__ __forceinline__ float entropy() const {
        const float h = ln(z) - s / z;
        return z < 0.5f || h < 0.f ? 0.f : h;
    }
};

// Grid: a warp per row.
template <class T>
__device__ __forceinline__ void row_entropy(const T* logits, float* out, long long n, int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES;
    if (row >= n) return;
    Softmax softmax;
    read_row(logits + row * d, d, lane, [&](auto& values) { softmax.absorb(values); });
    softmax.merge_warp(lane);
    if (lane == 0) out[row] = softmax.entropy();
}

#ifndef ONLY_FUNCTIONS
#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    row_entropy_##NAME(const T* __restrict__ logits, float* __restrict__ out, long long n, int d) {          \
        row_entropy(logits, out, n, d);                                                                      \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
