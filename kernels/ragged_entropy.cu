// EOE of each dialogue of a ragged batch: with w_i the energy of its i-th token (energy.cu) and Z = sum_i w_i,
//     EOE = -sum_i p_i ln p_i / ln n,  p_i = w_i / Z,  clipped to [0, 1]
// 0 for a dialogue of no or one token and where every weight is 0; NaN where a weight is NaN or infinite.
//
// Traffic: ragged_entropy_f32 the energies once, one value in d of what their kernel read; ragged_token_entropy x once;
// ragged_centered_entropy x once more than ragged_mean did, and the means from the caches for every row: a mean must
// be complete before the first distance from it, so twice x is the least.
//
// Versions, as in energy.cu:
//   1  weights in units of the largest, by division; logf. Its division spilled registers on sm_87.
//   2  weights in units of a power of two: exact, no division. token 7.9 / 6.5 / 3.4 (PTX 8.5)
//   3  ln by one lg2.approx of the mantissa instead of logf: error 1.0e-7 -> 1.6e-7            this file
// A lane keeps every 32nd energy and takes its logarithm once; in every lane for every token it would be, by estimate,
// 5 instructions an element more at d = 576.
#include "energy.cuh"

// Partial sums over weights in units of 2^e, e the exponent of the largest seen, so that nothing overflows and no large
// terms cancel: with r = w / 2^e, z = sum r and s = sum r ln r; then -sum p ln p = ln z - s/z. Scaling by powers of two
// is exact and needs no division.
struct Weights {
    int exponent = 1;  // biased as in a float32, 1 .. 253, so that 2^-e is a normal number too
    float z = 0.f, s = 0.f;

    __device__ __forceinline__ void rebase(int larger) {
        const int shift = exponent - larger;
        const float factor = shift < -126 ? 0.f : __uint_as_float((unsigned)(127 + shift) << 23);
        s = factor * fmaf((float)shift * LN_2, z, s);
        z *= factor;
        exponent = larger;
    }

    __device__ __forceinline__ void absorb(float weight) {
        rebase(max(exponent, min((int)(__float_as_uint(weight) >> 23), 253)));
        const float r = weight * __uint_as_float((unsigned)(254 - exponent) << 23);
        if (r == 0.f) return;  // 0 ln 0 = 0
        z += r;
        s = fmaf(r, ln(r), s);
    }

    // In lane 0, the sums of the whole warp.
    __device__ __forceinline__ void merge_warp(int lane) {
        rebase(__reduce_max_sync(ALL_LANES, exponent));
        warp_sum_to_lane0(z, s, lane);
    }

    // In the first warp, the sums of the whole block.
    __device__ __forceinline__ void merge_block() {
        __shared__ int exponents[WARPS_MAX];
        __shared__ float zs[WARPS_MAX], ss[WARPS_MAX];
        const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
        merge_warp(lane);
        if (lane == 0) { exponents[warp] = exponent; zs[warp] = z; ss[warp] = s; }
        __syncthreads();
        if (warp > 0) return;
        const bool one = lane < warps;
        exponent = one ? exponents[lane] : 1;
        z = one ? zs[lane] : 0.f;
        s = one ? ss[lane] : 0.f;
        merge_warp(lane);
    }

    // 0 for n < 2 and where every weight is 0; NaN stays.
    __device__ __forceinline__ float entropy(long long n) const {
        if (n < 2 || z == 0.f) return 0.f;
        return clip01((ln(z) - s / z) / ln((float)n));
    }
};

// Grid: a block per dialogue, a warp per token. A lane keeps every 32nd energy, so that the logarithms are
// taken once for 32 tokens.
template <class Energy>
__device__ __forceinline__ void entropy_of_dialogue(const long long* offsets, float* out, int b, Energy energy) {
    const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    const int dialogue = blockIdx.x;
    if (dialogue >= b) return;
    const long long first = offsets[dialogue], last = offsets[dialogue + 1];
    Weights weights;
    #pragma unroll 1
    for (long long start = first + warp; start < last; start += (long long)LANES * warps) {
        float mine = 0.f;
        #pragma unroll 1
        for (int k = 0; k < LANES && start + (long long)k * warps < last; k++) {
            const float sum = energy(start + (long long)k * warps, dialogue, lane);
            if (lane == k) mine = sum;
        }
        weights.absorb(mine);
    }
    weights.merge_block();
    if (threadIdx.x == 0) out[dialogue] = weights.entropy(last - first);
}

#ifndef ONLY_FUNCTIONS
// Grid: a block per dialogue.
extern "C" __global__ void __launch_bounds__(THREADS_MAX)
ragged_entropy_f32(const float* __restrict__ energy, const long long* __restrict__ offsets,
                   float* __restrict__ out, int b) {
    const int dialogue = blockIdx.x;
    if (dialogue >= b) return;
    const long long first = offsets[dialogue], last = offsets[dialogue + 1];
    Weights weights;
    #pragma unroll 1
    for (long long i = first + threadIdx.x; i < last; i += blockDim.x) weights.absorb(energy[i]);
    weights.merge_block();
    if (threadIdx.x == 0) out[dialogue] = weights.entropy(last - first);
}

#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    ragged_token_entropy_##NAME(const T* __restrict__ x, const long long* __restrict__ offsets,              \
                                float* __restrict__ out, int b, int d) {                                     \
        entropy_of_dialogue(offsets, out, b, [&](long long row, int, int lane) {                             \
            return energy_of(x + row * d, d, lane);                                                          \
        });                                                                                                  \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX, 4)                                             \
    ragged_centered_entropy_##NAME(const T* __restrict__ x, const float* __restrict__ means,                 \
                                   const long long* __restrict__ offsets, float* __restrict__ out, int b,    \
                                   int d) {                                                                  \
        entropy_of_dialogue(offsets, out, b, [&](long long row, int dialogue, int lane) {                    \
            return energy_about(x + row * d, means + (long long)dialogue * d, d, lane);                      \
        });                                                                                                  \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
