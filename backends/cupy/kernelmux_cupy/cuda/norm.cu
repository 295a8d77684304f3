// rms_norm, and add_rms_norm: y = gamma * x / sqrt(mean(x^2) + epsilon), where x is a row, or total = a + b.
//
// Layout: rows of `columns`, dense. Threads: a block a row; thread t holds columns WIDE (t + c blockDim) .. + WIDE for each
// chunk c, so that a row is read once, in registers from then on, and written once. Gamma is read beside the row, not
// after the sum. Floor: a, b, gamma, total and y once each.
// Macros: A, B, TOTAL, Y, the formats' names, Y perhaps q8_32; ADD, 0 or 1; WIDE, 1 or 4 columns at a time; CHUNKS.

#include "order.cuh"
#include "rows.cuh"

// total may be the memory of a or b, y that of a: a thread has read its columns when it writes them.
extern "C" __global__ void __launch_bounds__(1024) rms_norm(
    const A *a, const B *b, TOTAL *total, const float *gamma, void *y, float *scales, float *sums, float epsilon,
    int columns) {
    follow();
    const Written<Y> written(y, scales, sums);
    const long long row = (long long)blockIdx.x * columns;
    float x[CHUNKS][WIDE], share[CHUNKS][WIDE];
    float squares = 0.0f;
    UNROLLED(chunk, CHUNKS) {
        const int column = WIDE * (threadIdx.x + chunk * blockDim.x);
        UNROLLED(i, WIDE) x[chunk][i] = share[chunk][i] = 0.0f;
        if (column < columns) {
            read(a, row + column, x[chunk]);
            read(gamma, column, share[chunk]);
            if (ADD) {
                float other[WIDE];
                read(b, row + column, other);
                UNROLLED(i, WIDE) x[chunk][i] += other[i];
                write(total, row + column, x[chunk]);
            }
        }
        UNROLLED(i, WIDE) squares += x[chunk][i] * x[chunk][i];
    }
    const float factor = rsqrtf(block_sum(squares) / (float)columns + epsilon);
    UNROLLED(chunk, CHUNKS) {
        const int column = WIDE * (threadIdx.x + chunk * blockDim.x);
        UNROLLED(i, WIDE) x[chunk][i] *= factor * share[chunk][i];
        written.store(row + column, x[chunk], column < columns);
    }
}
