// Numbers in another format: one of f32, bf16, f16 to another (`plain`), to q8_32 (`quantize`) and from it
// (`dequantize`).
//
// Layout: elements of all rows one after the other; a block of 32 lies within a row.
// Threads: one an element (`plain`), else one for four neighbours, eight threads a block of 32.
// Floor: each element read and written once.
//
// Macros: FROM and TO, names of float formats; that in place of q8_32 is not looked at.
#include "number.cuh"
#include "order.cuh"
#include "q8.cuh"
#include "warp.cuh"

extern "C" __global__ void plain(const FROM *x, TO *y, long long count) {
    follow();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) put(y + i, to_float(x[i]));
}

// `count` fours; all threads of a warp take part in its sums.
extern "C" __global__ void quantize(const FROM *x, char4 *y, float *scales, float *sums, long long count) {
    follow();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    float v[4];
    UNROLLED(j, 4) v[j] = i < count ? to_float(x[4 * i + j]) : 0.0f;
    const float peak = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
    const float scale = q8_scale(largest<8>(peak));
    UNROLLED(j, 4) v[j] = q8_value(v[j], scale);
    const float sum = total<8>(v[0] + v[1] + v[2] + v[3]);
    if (i >= count) return;
    y[i] = make_char4((signed char)v[0], (signed char)v[1], (signed char)v[2], (signed char)v[3]);
    if (i % 8 == 0) {
        scales[i / 8] = scale;
        sums[i / 8] = scale * sum;
    }
}

extern "C" __global__ void dequantize(const char4 *x, const float *scales, TO *y, long long count) {
    follow();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const char4 q = x[i];
    const float scale = scales[i / 8];
    put(y + 4 * i, scale * q.x);
    put(y + 4 * i + 1, scale * q.y);
    put(y + 4 * i + 2, scale * q.z);
    put(y + 4 * i + 3, scale * q.w);
}
