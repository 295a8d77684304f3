// Products of quantised weights and q8_32 activations: mul_mat, mul_mat_add, qkv, gate_up_swiglu.
//
//   y[r][j] = sum over k of W[j][k] x[r][k], plus bias and residual; or silu(gate) * up of two such
//
// Layout: weights in tiles of 32 rows by BLOCKS x 32 columns (formats.cuh), tile (group, t) at group * tiles + t.
// Threads: a block takes sets of GROUPS groups of 32 rows (of a pair: a group of gate and the same of up), every
// gridDim.x-th one. Its WARPS warps take the tiles along k in turns, each through a ring of STAGES slots in shared
// memory of its own (ring.cuh): the tiles' bytes as they are, and the rows' activations. The ring runs on into the next
// set, so that memory is busy while the warps' sums are added; that is done in the order of the warps, so that a result
// does not depend on who comes first. Weights are asked for before the kernel ahead has ended (order.cuh).
// Floor: the file's bytes of the weights, each read once, at the speed of memory.
//
// Macros: PARTS matrices of formats FORMAT0.. written as OUT0.., names of formats, perhaps q8_32; GATED (two matrices,
// one output); RESIDUAL's format; BLOCKS, CHUNK (formats.cuh), WARPS, GROUPS, STAGES, SLOT bytes, ROWS of activations,
// RESIDENT blocks a multiprocessor; MATRIX: by the matrix unit (matrix.cuh), not by __dp4a (lanes.cuh).
// Shared memory: WARPS * (STAGES * SLOT + 4 * PITCH * ROWS * TILES * KEEPS) bytes.
#include "formats.cuh"
#include "order.cuh"
#include "q8.cuh"
#include "ring.cuh"
#include "warp.cuh"
#if MATRIX
#include "matrix.cuh"
#else
#include "lanes.cuh"
#endif

// Tiles of weights in a slot.
const int TILES = GATED ? 2 : GROUPS;
// Places for the warps' sums.
const int KEEPS = TILES * ROWS > 2 ? 1 : 2;
// Floats from one row's 32 sums to the next: of the matrix unit four rows are written at once, to banks of their own.
const int PITCH = MATRIX ? 36 : 32;

struct Output {
    const float *bias;
    const RESIDUAL *residual;
    void *y;
    float *scales, *sums;
    int n;
};

// Writes one row's 32 outputs of a group, one a lane; those from `n` on are not there.
template <class T>
struct Writer {
    static __device__ __forceinline__ void write(const Output &out, int row, int j, float y) {
        if (j < out.n) put((T *)out.y + (long long)row * out.n + j, y);
    }
};
template <>
struct Writer<q8_32> {
    static __device__ __forceinline__ void write(const Output &out, int row, int j, float y) {
        const float scale = q8_scale(largest<32>(fabsf(y))), q = q8_value(y, scale), sum = total<32>(q);
        if (j >= out.n) return;
        const long long block = (long long)row * (out.n / 32) + j / 32;
        ((signed char *)out.y)[block * 32 + j % 32] = (signed char)q;
        if (j % 32 == 0) {
            out.scales[block] = scale;
            out.sums[block] = scale * sum;
        }
    }
};

__device__ __forceinline__ float with_bias(const float *bias, int j, int n, float y) {
    return bias && j < n ? y + bias[j] : y;
}

// Adds the warps' sums of a set whose first group is `group`, and writes its outputs.
template <class T>
__device__ __forceinline__ void finish(
    const float *kept, const Output &out, const float *other_bias, int m, int group, int warp, int lane) {
    const int outputs = GATED ? ROWS : TILES * ROWS;
    for (int i = warp; i < outputs; i += WARPS) {
        const int row = i % ROWS, j = (group + i / ROWS) * 32 + lane;
        if (row >= m || j - lane >= out.n) continue;
        float y = 0.0f, z = 0.0f;
#pragma unroll 4
        for (int w = 0; w < WARPS; ++w) {
            y += kept[(w * TILES * ROWS + i) * PITCH + lane];
            if (GATED) z += kept[(w * TILES * ROWS + ROWS + row) * PITCH + lane];
        }
        y = with_bias(out.bias, j, out.n, y);
        if (GATED) y = silu(y) * with_bias(other_bias, j, out.n, z);
        if (out.residual && j < out.n) y += to_float(out.residual[(long long)row * out.n + j]);
        Writer<T>::write(out, row, j, y);
    }
}

// Of many rows and several matrices each product gets registers for itself; together they spill.
#if PARTS > 1 && ROWS >= 16 && !GATED
#define PRODUCT __noinline__
#else
#define PRODUCT __forceinline__
#endif

// This block's sets of one matrix, or of a pair: `first` and every gridDim.x-th after it, below `sets`.
template <class F, class G, class T>
__device__ PRODUCT void product(
    const u8 *weights, const u8 *others, const float *other_bias, const Output &out, const Activations &x, int first,
    int sets, const Ring &ring, float *all) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int tiles = x.k / COLUMNS, turns = (tiles + WARPS - 1) / WARPS, last = (out.n + 31) / 32 - 1;
    const int units = first < sets ? ((sets - 1 - first) / (int)gridDim.x + 1) * turns : 0;
    const int BYTES = 32 * (F::LANE + (TILES == 2 ? G::LANE : 0));

    const auto ask_weights = [&](int unit) {
        if (unit >= units) return;
        const int group = (first + unit / turns * (int)gridDim.x) * GROUPS, t = warp + unit % turns * WARPS;
        if (t >= tiles) return;
        u8 *slot = ring.slot(unit);
        ring.ask_tile<32 * F::LANE>(slot, weights + ((long long)group * tiles + t) * (32 * F::LANE));
        // Beyond the last group that one is read again, and not written.
        const long long other = GATED ? group : min(group + 1, last);
        if (TILES == 2)
            ring.ask_tile<32 * G::LANE>(slot + 32 * F::LANE, others + (other * tiles + t) * (32 * G::LANE));
    };
    const auto ask_rows = [&](int unit) {
        const int t = warp + unit % turns * WARPS;
        if (unit < units && t < tiles) ring.ask_rows(ring.slot(unit) + BYTES, x, t);
        ring.close();
    };

    Sums<TILES> sums;
    sums.clear();
    UNROLLED(unit, STAGES) ask_weights(unit);
    wait_for_inputs();
    UNROLLED(unit, STAGES) ask_rows(unit);
    for (int unit = 0; unit < units; ++unit) {
        ring.wait();
        const u8 *slot = ring.slot(unit);
        if (warp + unit % turns * WARPS < tiles) sums.template add<F, G>(slot, slot + BYTES, lane);
        __syncwarp();
        ask_weights(unit + STAGES);
        ask_rows(unit + STAGES);
        if (unit % turns == turns - 1) {
            // Few sums have two places, so that those of the next set wait for nobody.
            float *kept = all + (KEEPS == 2 ? unit / turns % 2 * WARPS * TILES * ROWS * PITCH : 0);
            sums.template keep<PITCH>(kept + warp * TILES * ROWS * PITCH, lane);
            sums.clear();
            __syncthreads();
            finish<T>(kept, out, other_bias, x.m, (first + unit / turns * (int)gridDim.x) * GROUPS, warp, lane);
            if (KEEPS == 1) __syncthreads();
        }
    }
    if (PARTS > 1) __syncthreads();
}

#define PART(i)                                                                                            \
    const u8 *weights##i, const float *bias##i, const RESIDUAL *residual##i, void *y##i, float *scales##i, \
        float *sums##i, int n##i
// Of matrix i: its sets come after `before` others in the order that blocks take them; leaves the block's next one.
#define TAKE(i)                                                                                                     \
    {                                                                                                               \
        const int sets = (n##i + 32 * GROUPS - 1) / (32 * GROUPS);                                                  \
        const Output out = {bias##i, residual##i, y##i, scales##i, sums##i, n##i};                                  \
        product<FORMAT##i, FORMAT##i, OUT##i>(weights##i, weights##i, nullptr, out, x, next, sets, ring, kept); \
        next = next < sets ? (int)gridDim.x - 1 - (sets - 1 - next) % (int)gridDim.x : next - sets;                 \
    }

extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) dp4a(
    PART(0),
#if PARTS > 1
    PART(1),
#endif
#if PARTS > 2
    PART(2),
#endif
    const u8 *integers, const u8 *scales, const u8 *sums, int m, int k) {
    extern __shared__ __align__(128) u8 memory[];
    let_next_start();
    const Ring ring{memory + threadIdx.x / 32 * STAGES * SLOT, (int)threadIdx.x % 32};
    float *kept = (float *)(memory + WARPS * STAGES * SLOT);
    const Activations x = {integers, scales, sums, m, k};
#if GATED
    const Output out = {bias0, residual0, y0, scales0, sums0, n0};
    product<FORMAT0, FORMAT1, OUT0>(weights0, weights1, bias1, out, x, blockIdx.x, (n0 + 31) / 32, ring, kept);
#else
    int next = blockIdx.x;
    TAKE(0)
#if PARTS > 1
    TAKE(1)
#endif
#if PARTS > 2
    TAKE(2)
#endif
#endif
}
