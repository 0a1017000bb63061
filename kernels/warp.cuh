// What the kernels share: element types, 16-byte loads, and sums over a warp.
//
// Needs no header of CUDA, so that nvcc, NVRTC and g++ (tests/kernels/cpu/cuda_on_cpu.h) compile the same text.
#pragma once

#define LANES 32
#define WARPS_MAX 32  // of a block of 1024 threads, the most that CUDA allows
#define THREADS_MAX 256
#define ALL_LANES 0xffffffffu

// The names of a kernel's entries end in the type of its input; sums are always float32.
#define FOR_EACH_TYPE(ENTRY) ENTRY(f32, float) ENTRY(f16, Half) ENTRY(bf16, BFloat)

struct Half { unsigned short bits; };    // IEEE binary16
struct BFloat { unsigned short bits; };  // the upper half of a float32

#ifndef CUDA_ON_CPU
__device__ __forceinline__ float half_to_float(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ __forceinline__ void halves_to_floats(unsigned pair, float& low, float& high) {
    asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h; }"
        : "=f"(low), "=f"(high) : "r"(pair));
}

// 2^x to 2 ulp; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
    float value;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// log2(x) to 2^-22 for x in [0.5, 2].
__device__ __forceinline__ float log2_fast(float x) {
    float value;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(value) : "f"(x));
    return value;
}

// The larger of the two, NaN if either is; fmaxf would drop the NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    float value;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(value) : "f"(a), "f"(b));
    return value;
}
#endif

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(Half x) { return half_to_float(x.bits); }
__device__ __forceinline__ float widen(BFloat x) { return __uint_as_float((unsigned)x.bits << 16); }

template <class T> struct Vector { enum { size = 16 / sizeof(T) }; };  // values in 16 bytes

// 16 bytes from an aligned address, as float32.
__device__ __forceinline__ void load16(const float* from, float* to) {
    const float4 word = *reinterpret_cast<const float4*>(from);
    to[0] = word.x; to[1] = word.y; to[2] = word.z; to[3] = word.w;
}

__device__ __forceinline__ void load16(const Half* from, float* to) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    halves_to_floats(word.x, to[0], to[1]); halves_to_floats(word.y, to[2], to[3]);
    halves_to_floats(word.z, to[4], to[5]); halves_to_floats(word.w, to[6], to[7]);
}

__device__ __forceinline__ void load16(const BFloat* from, float* to) {
    const uint4 word = *reinterpret_cast<const uint4*>(from);
    const unsigned words[4] = {word.x, word.y, word.z, word.w};
    #pragma unroll
    for (int k = 0; k < 4; k++) {
        to[2 * k] = __uint_as_float(words[k] << 16);
        to[2 * k + 1] = __uint_as_float(words[k] & 0xffff0000u);
    }
}

#define LN_2 0.6931471805599453f

// ln(x) to 2e-7 for normal x > 0, in a fifth of the instructions of logf; something finite for any other x.
__device__ __forceinline__ float ln(float x) {
    const int bits = __float_as_int(x), exponent = (bits - 0x3f400000) & 0xff800000;  // x = 2^e f, f in [0.75, 1.5)
    const float e = (float)exponent * 1.1920929e-7f;                                  // 2^-23
    return (e + log2_fast(__int_as_float(bits - exponent))) * LN_2;
}

template <class T> __device__ __forceinline__ bool aligned16(const T* p) {
    return (reinterpret_cast<size_t>(p) & 15) == 0;
}

__device__ __forceinline__ float warp_sum(float x) {
    #pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {  // NaN counts as some number
    const int bits = __float_as_int(x), ordered = bits ^ (bits >> 31 & 0x7fffffff);
    const int most = __reduce_max_sync(ALL_LANES, ordered);
    return __int_as_float(most ^ (most >> 31 & 0x7fffffff));
}

// Two sums for little more than one: half the lanes go on with x, half with y. Lane 0 gets both.
__device__ __forceinline__ void warp_sum_to_lane0(float& x, float& y, int lane) {
    const bool low = lane < LANES / 2;
    const float kept = low ? x : y, given = low ? y : x;
    float sum = kept + __shfl_xor_sync(ALL_LANES, given, LANES / 2);
    #pragma unroll
    for (int step = LANES / 4; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    x = sum;
    y = __shfl_xor_sync(ALL_LANES, sum, LANES / 2);
}

// Hands a row of d values to `absorb(values)`, each value to one lane of the warp: scalars up to the first 16-byte
// boundary, tiles of 16 values in 16-byte loads, single 16-byte loads, scalars at the end.
template <class T, class Absorb>
__device__ __forceinline__ void read_row(const T* row, int d, int lane, Absorb absorb) {
    constexpr int V = Vector<T>::size, PER_TILE = 16 / V;
    const int head = min(d, (int)((-reinterpret_cast<size_t>(row) & 15) / sizeof(T)));
    const int tail = (unsigned)(d - head) % V;
    int left = (unsigned)(d - head) / V;  // 16-byte vectors
    const T* from = row + head + lane * V;
    #pragma unroll 1
    for (; left >= PER_TILE * LANES; left -= PER_TILE * LANES, from += 16 * LANES) {
        float values[16];
        #pragma unroll
        for (int k = 0; k < PER_TILE; k++) load16(from + k * LANES * V, values + k * V);
        absorb(values);
    }
    #pragma unroll 1
    for (; left > lane; left -= LANES, from += LANES * V) {
        float values[V];
        load16(from, values);
        absorb(values);
    }
    if (lane < head + tail) {  // fewer than 16
        float values[1] = {widen(row[lane < head ? lane : d - tail - head + lane])};
        absorb(values);
    }
}

// Hands two rows of d values to `absorb(x, y)` value by value, in 16-byte loads where both rows are aligned.
template <class T, class U, class Absorb>
__device__ __forceinline__ void read_rows(const T* row, const U* other, int d, int lane, Absorb absorb) {
    constexpr int V = Vector<T>::size, W = Vector<U>::size;
    int done = 0;
    if (aligned16(row) && aligned16(other)) {
        done = d - (unsigned)d % V;
        const T* from = row + lane * V;
        const U* other_from = other + lane * V;
        #pragma unroll 2
        for (; from < row + done; from += LANES * V, other_from += LANES * V) {
            float x[V], y[V];
            load16(from, x);
            #pragma unroll
            for (int k = 0; k < V; k += W) load16(other_from + k, y + k);
            #pragma unroll
            for (int k = 0; k < V; k++) absorb(x[k], y[k]);
        }
    }
    #pragma unroll 1
    for (int i = done + lane; i < d; i += LANES) absorb(widen(row[i]), widen(other[i]));
}

__device__ __forceinline__ float clip01(float x) { return x < 0.f ? 0.f : x > 1.f ? 1.f : x; }  // keeps NaN
