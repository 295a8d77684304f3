// Products of bf16 or f16 weights and a few rows of activations, summed in float.
//
//   y[r][j] = sum over k of W[j][k] x[r][k], plus bias
//
// Layout: W [n, k] and x [m, k] as they are, k a multiple of 8: 16 bytes a load.
// Threads: a warp has OUTPUTS rows of W, its lanes take vectors of 8 columns in turns, AHEAD of them asked for before
// the first is used, and the first of them before the kernel ahead has ended (order.cuh). Activations come through the
// L1 cache, which the weights go past.
// Floor: W read once, at the speed of memory.
//
// Macros: WEIGHT, INPUT and OUT, the formats' names; ROWS of activations, OUTPUTS, AHEAD, WARPS of a block.
#include "number.cuh"
#include "order.cuh"
#include "warp.cuh"

#if __CUDA_ARCH__ >= 700
#define ONCE "ld.global.nc.L1::no_allocate.v4.u32"
#else
#define ONCE "ld.global.nc.v4.u32"
#endif

__device__ __forceinline__ uint4 read_once(const void *at) {
    uint4 v;
    asm volatile(ONCE " {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at));
    return v;
}

template <class T>
__device__ __forceinline__ void unpack(float *to, uint4 v) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
    UNROLLED(i, 4) {
        to[2 * i] = to_float(T{(u16)words[i]});
        to[2 * i + 1] = to_float(T{(u16)(words[i] >> 16)});
    }
}
template <class T>
__device__ __forceinline__ void read_eight(float *to, const T *at) {
    unpack<T>(to, *(const uint4 *)at);
}
__device__ __forceinline__ void read_eight(float *to, const float *at) {
    const float4 a = *(const float4 *)at, b = *((const float4 *)at + 1);
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w, to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) gemv(
    const WEIGHT *weights, const float *bias, const INPUT *x, OUT *y, int m, int n, int k) {
    const int lane = threadIdx.x % 32, first = (blockIdx.x * WARPS + threadIdx.x / 32) * OUTPUTS;
    const int vectors = k / 8;
    float sums[OUTPUTS][ROWS] = {};
    const WEIGHT *from[OUTPUTS];
    UNROLLED(o, OUTPUTS) from[o] = weights + (long long)min(first + o, n - 1) * k;

    uint4 held[OUTPUTS][AHEAD];
    const auto ask = [&](int v) {
        UNROLLED(a, AHEAD)
            UNROLLED(o, OUTPUTS)
                held[o][a] = v + 32 * a < vectors ? read_once(from[o] + 8 * (v + 32 * a)) : make_uint4(0, 0, 0, 0);
    };
    ask(lane);
    wait_for_inputs();
    if (first >= n) return;
    for (int v = lane; v < vectors; v += 32 * AHEAD) {
        UNROLLED(a, AHEAD) {
            if (v + 32 * a >= vectors) break;
            float w[OUTPUTS][8];
            UNROLLED(o, OUTPUTS) unpack<WEIGHT>(w[o], held[o][a]);
            UNROLLED(row, ROWS) {
                float in[8];
                // Beyond the last row that one is read again, and not written.
                read_eight(in, x + (long long)min(row, m - 1) * k + 8 * (v + 32 * a));
                UNROLLED(o, OUTPUTS)
                    UNROLLED(i, 8) sums[o][row] = fmaf(w[o][i], in[i], sums[o][row]);
            }
        }
        ask(v + 32 * AHEAD);
    }
    let_next_start();
    UNROLLED(o, OUTPUTS)
        UNROLLED(row, ROWS) {
            const float sum = total<32>(sums[o][row]);
            const int j = first + o;
            if (lane == 0 && j < n && row < m) put(y + (long long)row * n + j, bias ? sum + bias[j] : sum);
        }
}
