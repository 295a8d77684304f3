// q8_32: int8, and for 32 columns a scale (the largest magnitude over 127) and the sum of the values it stands for.
#pragma once

__device__ __forceinline__ float q8_scale(float peak) { return peak / 127.0f; }

// What values are divided by. A block of zeros has scale 0 and gives zeros.
__device__ __forceinline__ float q8_step(float scale) { return fmaxf(scale, 1.17549435e-38f); }

// An integer of -127 to 127, as a float.
__device__ __forceinline__ float q8_value(float x, float scale) {
    return fminf(fmaxf(rintf(__fdiv_rn(x, q8_step(scale))), -127.0f), 127.0f);
}
