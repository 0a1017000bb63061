// Entropy of the softmax of each row of logits, in nats:
//     H = ln Z - S/Z,  Z = sum_j e^(x_j - m),  S = sum_j (x_j - m) e^(x_j - m),  m = max_j x_j
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
            z_part += p;
            s_part = fmaf(shift, p, s_part);
        }
        z += z_part;
        s += s_part;
    }

    __device__ __forceinline__ void merge_warp() {
        rebase(warp_max(m));
        z = warp_sum(z);
        s = warp_sum(s);
    }

    // z >= 1, the largest term, unless every logit is -inf or there is none.
    __device__ __forceinline__ float entropy() const {
        const float h = logf(z) - s / z;
        return z < 0.5f || h < 0.f ? 0.f : h;
    }
};

// Grid: a warp per row.
template <class T>
__device__ __forceinline__ void row_entropy(const T* logits, float* out, long long n, int d) {
    const int lane = threadIdx.x % LANES;
    const long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (row >= n) return;
    Softmax softmax;
    read_row(logits + row * d, d, lane, [&](auto& values) { softmax.absorb(values); });
    softmax.merge_warp();
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
