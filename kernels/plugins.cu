// The kernels as TensorRT's plugins launch them: inputs first, then 32-bit integers, then the output. The computation
// and its cost are those of the files included.
#define ONLY_FUNCTIONS
#include "ragged_pool.cu"
#include "ragged_entropy.cu"
#include "dissimilarity.cu"

#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    plugin_mean_##NAME(const T* __restrict__ x, const long long* __restrict__ offsets, int d,                \
                       float* __restrict__ mean) {                                                           \
        ragged_mean(x, offsets, mean, d);                                                                    \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX)                                                \
    plugin_token_entropy_##NAME(const T* __restrict__ x, const long long* __restrict__ offsets, int b,       \
                                int d, float* __restrict__ out) {                                            \
        entropy_of_dialogue(offsets, out, b, [&](long long row, int, int lane) {                             \
            return energy_of(x + row * d, d, lane);                                                          \
        });                                                                                                  \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS_MAX, 4)                                             \
    plugin_centered_entropy_##NAME(const T* __restrict__ x, const float* __restrict__ means,                 \
                                   const long long* __restrict__ offsets, int b, int d,                      \
                                   float* __restrict__ out) {                                                \
        entropy_of_dialogue(offsets, out, b, [&](long long row, int dialogue, int lane) {                    \
            return energy_about(x + row * d, means + (long long)dialogue * d, d, lane);                      \
        });                                                                                                  \
    }
FOR_EACH_TYPE(ENTRIES)

extern "C" __global__ void __launch_bounds__(THREADS_MAX)
plugin_dissimilarity_f32(const float* __restrict__ v, const float* __restrict__ means,
                         const int* __restrict__ domain, int n, int d, float* __restrict__ out) {
    dissimilarity(v, means, domain, out, n, d);
}
