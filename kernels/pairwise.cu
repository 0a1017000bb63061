// Distance of every vector of a from every vector of b, unit vectors all:
//     out[i, j] = 1 - a_i . b_j, clipped to [0, 1]; NaN stays
//
// Traffic: a block reads 32 rows of a and of b once; so a is read ceil(m / 32) times in all, b ceil(n / 32) times.
//
// Versions, in dynamic PTX instructions per multiply-add:
//   1  tiles in shared memory read value by value, one long sum: error 9.5e-7 at d = 768
//   2  16 and 8 bytes at a time from shared memory, a sum per 32 columns: 2.0, error 1.6e-7, this file
#include "warp.cuh"

#define TILE 32      // rows of a, and rows of b, of one block
#define DEPTH 32     // columns read at a time
#define A_ROWS 4     // a thread's share of the tile: 4 rows of a, 2 of b
#define B_ROWS 2
#define THREADS (TILE / A_ROWS * (TILE / B_ROWS))

#define PITCH (TILE + 4)  // 16-byte aligned, and fewer bank conflicts than 32

// Columns first .. first + DEPTH of rows start .. start + TILE into tile[column][row]; 0 outside.
template <class T>
__device__ __forceinline__ void load_tile(const T* x, int rows, int d, int start, int first, float (*tile)[PITCH]) {
    constexpr int V = Vector<T>::size;
    if (aligned16(x) && d % V == 0) {
        for (int i = threadIdx.x; i < TILE * DEPTH / V; i += THREADS) {
            const int row = i / (DEPTH / V), column = i % (DEPTH / V) * V;
            float values[V] = {};
            if (start + row < rows && first + column < d)
                load16(x + (long long)(start + row) * d + first + column, values);
            #pragma unroll
            for (int k = 0; k < V; k++) tile[column + k][row] = values[k];
        }
    } else {
        #pragma unroll 2
        for (int i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
            const int row = i / DEPTH, column = i % DEPTH;
            const bool inside = start + row < rows && first + column < d;
            tile[column][row] = inside ? widen(x[(long long)(start + row) * d + first + column]) : 0.f;
        }
    }
}

// Grid: (ceil(m / 32), ceil(n / 32)), 128 threads.
template <class T>
__device__ __forceinline__ void pairwise(const T* a, const T* b, float* out, int n, int m, int d) {
    __shared__ __align__(16) float a_tile[DEPTH][PITCH], b_tile[DEPTH][PITCH];
    const int a_start = blockIdx.y * TILE, b_start = blockIdx.x * TILE;
    const int i = threadIdx.x / (TILE / B_ROWS) * A_ROWS, j = threadIdx.x % (TILE / B_ROWS) * B_ROWS;
    float dot[A_ROWS][B_ROWS] = {};
    #pragma unroll 1
    for (int first = 0; first < d; first += DEPTH) {
        float part[A_ROWS][B_ROWS] = {};  // of these columns, which rounds less than one long sum
        load_tile(a, n, d, a_start, first, a_tile);
        load_tile(b, m, d, b_start, first, b_tile);
        __syncthreads();
        #pragma unroll 8
        for (int k = 0; k < DEPTH; k++) {
            const float4 a4 = *reinterpret_cast<const float4*>(&a_tile[k][i]);
            const float2 b2 = *reinterpret_cast<const float2*>(&b_tile[k][j]);
            const float as[A_ROWS] = {a4.x, a4.y, a4.z, a4.w}, bs[B_ROWS] = {b2.x, b2.y};
            #pragma unroll
            for (int p = 0; p < A_ROWS; p++)
                #pragma unroll
                for (int q = 0; q < B_ROWS; q++) part[p][q] = fmaf(as[p], bs[q], part[p][q]);
        }
        #pragma unroll
        for (int p = 0; p < A_ROWS; p++)
            #pragma unroll
            for (int q = 0; q < B_ROWS; q++) dot[p][q] += part[p][q];
        __syncthreads();
    }
    #pragma unroll
    for (int p = 0; p < A_ROWS; p++)
        #pragma unroll
        for (int q = 0; q < B_ROWS; q++)
            if (a_start + i + p < n && b_start + j + q < m)
                out[(long long)(a_start + i + p) * m + b_start + j + q] = clip01(1.f - dot[p][q]);
}

#ifndef ONLY_FUNCTIONS
#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                    \
    pairwise_##NAME(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, int n, int m, \
                    int d) {                                                                                 \
        pairwise(a, b, out, n, m, d);                                                                        \
    }
FOR_EACH_TYPE(ENTRIES)
#endif
