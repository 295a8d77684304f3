// Numbers in memory: f32, bf16 and f16, read as float and written from float, rounded to nearest. The formats' names
// are types here, so that a macro may name one.
// No header of the CUDA toolkit is needed: NVRTC comes without them.
#pragma once

// A loop whose every turn is written out.
#define UNROLLED(i, count) _Pragma("unroll") for (int i = 0; i < (count); ++i)

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

typedef float f32;
struct f16 { u16 bits; };
struct bf16 { u16 bits; };
struct q8_32;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
__device__ __forceinline__ float to_float(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ __forceinline__ void put(float *at, float x) { *at = x; }
__device__ __forceinline__ void put(bf16 *at, float x) {
    u32 bits = __float_as_uint(x);
    // Half of the last place, less one where the number below is even; a NaN stays one.
    bits = (bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x00400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    at->bits = (u16)(bits >> 16);
}
__device__ __forceinline__ void put(f16 *at, float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    at->bits = bits;
}

// exp may be infinite: then it is 0, with x's sign.
__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }
