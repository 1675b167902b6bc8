// A matrix product by tiles: y[m, n] = sum over k of a(m, k) * b(n, k), by a block of 256 threads for 64 x 64 results.
// a and b are functions, so that a transposed matrix, or one that exists only as an index calculation, is all the same.
//
// Each thread keeps 4 x 4 sums in registers and reads 8 numbers from shared memory for 16 products. Chains of additions are
// as long as k: float loses what a plain loop loses.

constexpr int TILE = 64, DEPTH = 16;

// y(m, n, sum) is called once for each result inside rows x columns.
template <class A, class B, class Y>
__forceinline__ void gemm_tile(int rows, int columns, int depth, int m0, int n0, A a, B b, Y y) {
  __shared__ real as[DEPTH][TILE + 1], bs[DEPTH][TILE + 1];  // the odd width spreads a column over all banks
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  real sum[4][4] = {};
  for (int k0 = 0; k0 < depth; k0 += DEPTH) {
#pragma unroll
    for (int i = 0; i < TILE * DEPTH / 256; i++) {
      const int k = threadIdx.x % DEPTH, row = threadIdx.x / DEPTH + i * (256 / DEPTH);
      as[k][row] = m0 + row < rows && k0 + k < depth ? a(m0 + row, k0 + k) : real(0);
      bs[k][row] = n0 + row < columns && k0 + k < depth ? b(n0 + row, k0 + k) : real(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DEPTH; k++) {
      real u[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; i++) u[i] = as[k][ty + 16 * i], v[i] = bs[k][tx + 16 * i];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum[i][j] += u[i] * v[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 4; i++)
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int m = m0 + ty + 16 * i, n = n0 + tx + 16 * j;
      if (m < rows && n < columns) y(m, n, sum[i][j]);
    }
}
