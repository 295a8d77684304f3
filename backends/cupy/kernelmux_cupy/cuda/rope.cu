// rope: each pair of a head's first `dims` elements turned by its position; queries and keys in one launch.
//
// Layout: q [m, heads, dim], k [m, kv_heads, dim], rows q_row and k_row apart; results dense. Threads: 32 x 8 a block,
// for a row and eight heads of q and k together; the block's angles are computed once, whole turns taken off in float64,
// so that far positions lose nothing.
// Floor: q, k and their results once each.
// Macros: Q, K, Q_OUT, K_OUT, the formats' names; MOST, the pairs of a head at most.

#include "order.cuh"
#include "rows.cuh"

template <class X, class T>
__device__ __forceinline__ void turn(
    const X *x, T *y, const float2 *angles, int dims, int dim, int left_step, int right) {
    for (int pair = threadIdx.x; pair < dims / 2; pair += 32) {
        const int at = pair * left_step, with = at + right;
        const float a = to_float(x[at]), b = to_float(x[with]);
        const float2 angle = angles[pair];
        put(y + at, a * angle.x - b * angle.y);
        put(y + with, a * angle.y + b * angle.x);
    }
    for (int passed = dims + threadIdx.x; passed < dim; passed += 32) put(y + passed, to_float(x[passed]));
}

// `turns`: whole turns a position, one a pair; `divisors` of them, or null. The results may be the inputs' memory: the
// thread that writes an element is the one that has read it, and its partner.
extern "C" __global__ void rope(
    const Q *q, const K *k, Q_OUT *q_out, K_OUT *k_out, const int *positions, const double *turns,
    const float *divisors, float magnitude, int adjacent, int dims, int dim, int heads, int kv_heads, int q_row,
    int k_row) {
    follow();
    __shared__ float2 angles[MOST];
    const long long row = blockIdx.x;
    const double position = positions[row];
    for (int pair = threadIdx.y * 32 + threadIdx.x; pair < dims / 2; pair += 256) {
        const double each = divisors ? turns[pair] / (double)divisors[pair] : turns[pair];
        const double count = position * each;
        float sine, cosine;
        sincospif((float)(2.0 * (count - rint(count))), &sine, &cosine);
        angles[pair] = make_float2(cosine * magnitude, sine * magnitude);
    }
    __syncthreads();
    const int left_step = adjacent ? 2 : 1, right = adjacent ? 1 : dims / 2;
    const int head = blockIdx.y * 8 + threadIdx.y;
    if (head < heads) {
        turn(q + row * q_row + head * dim, q_out + (row * heads + head) * dim, angles, dims, dim, left_step, right);
    } else if (head < heads + kv_heads) {
        const int key = head - heads;
        turn(k + row * k_row + key * dim, k_out + (row * kv_heads + key) * dim, angles, dims, dim, left_step, right);
    }
}
