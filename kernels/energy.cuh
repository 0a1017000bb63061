// The energy of one token, by one warp: sum_j x_j^2, or sum_j (x_j - mean_j)^2.
#pragma once
#include "warp.cuh"

template <class T> __device__ __forceinline__ float energy_of(const T* row, int d, int lane) {
    float energy = 0.f;
    read_row(row, d, lane, [&](auto& values) {
        float part = 0.f;  // of a tile, which rounds less than one long sum
        #pragma unroll
        for (float x : values) part = fmaf(x, x, part);
        energy += part;
    });
    return warp_sum(energy);
}

template <class T>
__device__ __forceinline__ float energy_about(const T* row, const float* mean, int d, int lane) {
    float energy = 0.f;
    read_rows(row, mean, d, lane, [&](float x, float mu) { energy = fmaf(x - mu, x - mu, energy); });
    return warp_sum(energy);
}
