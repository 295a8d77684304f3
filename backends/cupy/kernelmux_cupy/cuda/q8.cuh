// q8_32: int8, and for 32 columns a scale (the largest magnitude over 127) and the sum of the values it stands for.
#pragma once

__device__ __forceinline__ float q8_scale(float peak) { return __fdiv_rn(peak, 127.0f); }

// An integer of -127 to 127, as a float. A block of zeros has scale 0 and gives zeros.
__device__ __forceinline__ float q8_value(float x, float scale) {
    return fminf(fmaxf(rintf(__fdiv_rn(x, fmaxf(scale, 1.17549435e-38f))), -127.0f), 127.0f);
}

// Over LANES neighbours of a warp, all of which must call: the largest, and the sum.
template <int LANES>
__device__ __forceinline__ float largest(float x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
    return x;
}
template <int LANES>
__device__ __forceinline__ float total(float x) {
#pragma unroll
    for (int step = LANES / 2; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
