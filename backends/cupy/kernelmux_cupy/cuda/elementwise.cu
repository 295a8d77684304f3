// add, mul, silu and swiglu: y[i] = OP(a[i], b[i]), in float32, rounded once.
//
// Layout: tensors are flat; rows need no heed, for blocks of q8_32 follow one another. Threads: 256 a block, each four
// neighbouring elements (16 bytes of f32). Floor: a, b and y once each; silu reads no b.
// Macros: OP; A, B, Y, the formats' names; Y may be q8_32, whose scales and sums are written then.

#include "order.cuh"
#include "rows.cuh"

__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float mul(float a, float b) { return a * b; }
__device__ __forceinline__ float silu(float a, float) { return silu(a); }
__device__ __forceinline__ float swiglu(float gate, float up) { return silu(gate) * up; }

// An output may be an input's memory: a thread has read its elements when it writes them.
extern "C" __global__ void elementwise(
    const A *a, const B *b, void *y, float *scales, float *sums, long long count) {
    follow();
    const Written<Y> written(y, scales, sums);
    long long at = 4 * ((long long)blockIdx.x * blockDim.x + threadIdx.x);
    const bool whole = at + 4 <= count;
    float left[4] = {}, right[4] = {};
    if (whole) {
        read(a, at, left);
        read(b, at, right);
    }
    UNROLLED(i, 4) left[i] = OP(left[i], right[i]);
    written.store(at, left, whole);
    if (whole) return;
    for (; at < count; ++at) written.store_one(at, OP(to_float(a[at]), to_float(b[at])));
}
