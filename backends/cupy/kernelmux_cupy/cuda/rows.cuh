// Columns of rows, some at a time: as they are read, as they are summed, and as they are written, in a float format or
// in q8_32.
#pragma once

#include "number.cuh"
#include "q8.cuh"
#include "warp.cuh"

template <class T, int N> struct alignas(sizeof(T) * N) Several { T item[N]; };

// N numbers from `at` on, a multiple of N.
template <int N, class T> __device__ __forceinline__ void read(const T *from, long long at, float (&to)[N]) {
    const Several<T, N> several = *reinterpret_cast<const Several<T, N> *>(from + at);
    UNROLLED(i, N) to[i] = to_float(several.item[i]);
}

template <int N, class T> __device__ __forceinline__ void write(T *to, long long at, const float (&from)[N]) {
    Several<T, N> several;
    UNROLLED(i, N) put(&several.item[i], from[i]);
    *reinterpret_cast<Several<T, N> *>(to + at) = several;
}

// The sum over a block of whole warps, in every thread. Called once a kernel.
__device__ __forceinline__ float block_sum(float x) {
    __shared__ float of_warp[32];
    const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
    x = total<32>(x);
    if (lane == 0) of_warp[threadIdx.x / 32] = x;
    __syncthreads();
    return total<32>(lane < warps ? of_warp[lane] : 0.0f);
}

// A tensor that is written. `store` is called by whole warps; lanes whose columns are not `there` write nothing.
template <class T> struct Written {
    T *data;

    __device__ __forceinline__ Written(void *data, float *, float *) : data(static_cast<T *>(data)) {}

    template <int N> __device__ __forceinline__ void store(long long at, const float (&x)[N], bool there) const {
        if (there) write(data, at, x);
    }
    // What four columns leave over.
    __device__ __forceinline__ void store_one(long long at, float x) const { put(data + at, x); }
};

// Eight neighbouring lanes hold the 32 columns of a block, four each.
template <> struct Written<q8_32> {
    signed char *data;
    float *scales, *sums;

    __device__ __forceinline__ Written(void *data, float *scales, float *sums)
        : data(static_cast<signed char *>(data)), scales(scales), sums(sums) {}

    template <int N> __device__ __forceinline__ void store(long long at, const float (&x)[N], bool there) const {
        static_assert(N == 4, "a lane holds four columns");
        float peak = 0.0f;
        UNROLLED(i, 4) peak = fmaxf(peak, fabsf(x[i]));
        const float scale = q8_scale(largest<8>(peak));
        // One division for four columns.
        const float share = 1.0f / q8_step(scale);
        int sum = 0;
        u32 word = 0;
        UNROLLED(i, 4) {
            const int steps = __float2int_rn(x[i] * share);
            sum += steps;
            word |= (u32)(steps & 0xff) << (8 * i);
        }
        sum = total<8>(sum);
        if (!there) return;
        *reinterpret_cast<u32 *>(data + at) = word;
        if (threadIdx.x % 8 == 0) {
            scales[at / 32] = scale;
            sums[at / 32] = (float)sum * scale;
        }
    }
    // Nothing is left over of whole blocks.
    __device__ __forceinline__ void store_one(long long, float) const {}
};
