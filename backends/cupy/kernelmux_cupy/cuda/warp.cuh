// What the lanes of a warp find together. All of its 32 call.
#pragma once

constexpr unsigned WARP = 0xffffffffu;

// Over LANES neighbours: the largest, and the sum, in each of them.
template <int LANES> __device__ __forceinline__ float largest(float x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(WARP, x, step));
    return x;
}
template <int LANES, class T> __device__ __forceinline__ T total(T x) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) x += __shfl_xor_sync(WARP, x, step);
    return x;
}
