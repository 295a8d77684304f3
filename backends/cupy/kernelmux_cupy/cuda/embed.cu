// embed: row ids[i] of a table, dequantised as it is looked up; the table is what the file holds, GGUF's blocks too.
//
// Layout: the table's rows, dense or of blocks; y [m, columns]. Threads: 256 a block, a row and one column each, which
// finds its block's scale by itself. Floor: the rows as stored once, y once.
// Macros: TABLE, the format's name; Y.

#include "blocks.cuh"
#include "order.cuh"
#include "rows.cuh"

// Block types say how many numbers a block holds, in how many bytes, and what its number i is.
template <class T> struct Table {
    static __device__ __forceinline__ float at(const void *table, long long row, int columns, int column) {
        const long long block = row * (columns / T::NUMBERS) + column / T::NUMBERS;
        return T::number(static_cast<const u8 *>(table) + block * T::BYTES, column % T::NUMBERS);
    }
};

template <class T> struct Dense {
    static __device__ __forceinline__ float at(const void *table, long long row, int columns, int column) {
        return to_float(static_cast<const T *>(table)[row * columns + column]);
    }
};
template <> struct Table<f32> : Dense<f32> {};
template <> struct Table<f16> : Dense<f16> {};
template <> struct Table<bf16> : Dense<bf16> {};

extern "C" __global__ void embed(const int *ids, const void *table, Y *y, int columns) {
    follow();
    const int column = blockIdx.y * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    const float x = Table<TABLE>::at(table, ids[blockIdx.x], columns, column);
    put(y + (long long)blockIdx.x * columns + column, x);
}
