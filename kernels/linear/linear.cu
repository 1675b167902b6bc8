// The fully connected layer and its gradients: one matrix product of operands in any order, y[m, n] = sum a[m, k] b[n, k].
#include "types.cuh"
#include "gemm.cuh"

// An element (i, k) of a lies at i * am + k * ak; likewise of b. bias: one number per column, added where has_bias.
extern "C" __global__ void __launch_bounds__(256)
    linear(const T* a, const T* b, const T* bias, T* y, int rows, int columns, int depth, int am, int ak, int bn, int bk,
           int has_bias) {
  gemm_tile(
      rows, columns, depth, blockIdx.x * TILE, blockIdx.y * TILE,
      [=](int m, int k) { return wide(a[(size_t)m * am + (size_t)k * ak]); },
      [=](int n, int k) { return wide(b[(size_t)n * bn + (size_t)k * bk]); },
      [=](int m, int n, real v) {
        y[(size_t)m * columns + n] = narrow<T>(has_bias ? v + wide(bias[n]) : v);
      });
}
