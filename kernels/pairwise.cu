// Distance of every vector of a from every vector of b, unit vectors all:
//     out[i, j] = 1 - a_i . b_j, clipped to [0, 1]
#include "warp.cuh"

#define TILE 32      // rows of a, and rows of b, of one block
#define DEPTH 32     // columns read at a time
#define A_ROWS 4     // a thread's share of the tile: 4 rows of a, 2 of b
#define B_ROWS 2
#define THREADS (TILE / A_ROWS * (TILE / B_ROWS))

// Columns first .. first + DEPTH of rows start .. start + TILE into tile[column][row]; 0 outside.
template <class T>
__device__ __forceinline__ void load_tile(const T* x, int rows, int d, int start, int first, float (*tile)[TILE + 4]) {
    constexpr int V = Vector<T>::size;
    if (aligned16(x) && d % V == 0) {
        for (int i = threadIdx.x; i < TILE * DEPTH / V; i += THREADS) {
            const int row = i / (DEPTH / V), column = i % (DEPTH / V) * V;
            float values[V] = {};
            if (start + row < rows && first + column < d) load16(x + (long long)(start + row) * d + first + column, values);
            #pragma unroll
            for (int k = 0; k < V; k++) tile[column + k][row] = values[k];
        }
    } else {
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
    __shared__ float a_tile[DEPTH][TILE + 4], b_tile[DEPTH][TILE + 4];
    const int a_start = blockIdx.y * TILE, b_start = blockIdx.x * TILE;
    const int i = threadIdx.x / (TILE / B_ROWS) * A_ROWS, j = threadIdx.x % (TILE / B_ROWS) * B_ROWS;
    float dot[A_ROWS][B_ROWS] = {};
    for (int first = 0; first < d; first += DEPTH) {
        load_tile(a, n, d, a_start, first, a_tile);
        load_tile(b, m, d, b_start, first, b_tile);
        __syncthreads();
        #pragma unroll
        for (int k = 0; k < DEPTH; k++)
            #pragma unroll
            for (int p = 0; p < A_ROWS; p++)
                #pragma unroll
                for (int q = 0; q < B_ROWS; q++) dot[p][q] = fmaf(a_tile[k][i + p], b_tile[k][j + q], dot[p][q]);
        __syncthreads();
    }
    #pragma unroll
    for (int p = 0; p < A_ROWS; p++)
        #pragma unroll
        for (int q = 0; q < B_ROWS; q++)
            if (a_start + i + p < n && b_start + j + q < m)
                out[(long long)(a_start + i + p) * m + b_start + j + q] = clip01(1.f - dot[p][q]);
}

#define ENTRIES(NAME, T)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                    \
    pairwise_##NAME(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out, int n, int m, \
                    int d) {                                                                                 \
        pairwise(a, b, out, n, m, d);                                                                        \
    }
FOR_EACH_TYPE(ENTRIES)
