// Step 4: fp32 as fast as plain multiply-adds go.
//
// What changed from step 3, and why:
// - Each thread keeps 8 x TN sums and reads 8 + TN numbers from shared memory for 8 TN products: the arithmetic units no
//   longer wait for shared memory. TN follows from -DCOLUMNS, the width of a tile (32, 64 or 128 filters).
// - 16 bytes per access, everywhere: channels are neighbours in memory, so four of them are one load. (Channels that are no
//   multiple of 4 are padded with zeros beforehand.)
// - Two tiles in shared memory, and the next one already on its way into registers while one is multiplied: one barrier per
//   tile instead of two, and memory's latency is hidden.
// - No divisions in the loop: a thread knows its pixel, and steps from tap to tap by additions.
// - dgrad with stride u: pixels are sorted into u * v classes by (h mod u, w mod v), blockIdx.y. All pixels of a class meet
//   the same taps, so the others are never visited (step 3 multiplies zeros: 3 of 4 products at stride 2).
//
// Needs one group, C and K multiples of 4, and at most 256 taps in dgrad. A tile is 128 rows x COLUMNS;
// include/conv_tiles.cuh says where its numbers come from.
// Source of the tiling: Boehm 2022, "How to optimize a CUDA matmul kernel"; of the classes: cutlass's strided dgrad.
#ifndef COLUMNS
#define COLUMNS 128
#endif
constexpr int BM = 128, BN = COLUMNS, THREADS = 256;
constexpr int BK = BN == 128 ? 8 : 16;  // 64 sums leave registers for no more than 8 deep
constexpr int TN = BN / 16, CHUNK = TN < 4 ? TN : 4;
using number = float;
#include "conv_tiles.cuh"

// A piece goes into a column of the tile where it runs along the sum, else into a row.
template <int WIDTH> __forceinline__ void put(const AlongSum<WIDTH>& a, float (*tile)[WIDTH + 4], int i, float4 v) {
  const int k = a.depth(i), r = a.row(i);
  tile[k][r] = v.x, tile[k + 1][r] = v.y, tile[k + 2][r] = v.z, tile[k + 3][r] = v.w;
}
template <int WIDTH> __forceinline__ void put(const AlongRows<WIDTH>& a, float (*tile)[WIDTH + 4], int i, float4 v) {
  *(float4*)&tile[a.depth(i)][a.row(i)] = v;
}
__forceinline__ float4 piece(const float* at) { return at ? *(const float4*)at : float4{0, 0, 0, 0}; }

// sum[i][j] += over all depths, for this thread's rows i and columns j of the tile.
template <class A, class B> __forceinline__ void multiply(A& a, B& b, int tiles, float (&sum)[8][TN]) {
  __shared__ __align__(16) float as[2][BK][BM + 4], bs[2][BK][BN + 4];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float4 u[A::LOADS], v[B::LOADS];
  auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < A::LOADS; i++) u[i] = piece(a.at(i));
#pragma unroll
    for (int i = 0; i < B::LOADS; i++) v[i] = piece(B::active() ? b.at(i) : nullptr);
    a.next(), b.next();
  };
  auto store = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < A::LOADS; i++) put(a, as[buffer], i, u[i]);
#pragma unroll
    for (int i = 0; i < B::LOADS; i++)
      if (B::active()) put(b, bs[buffer], i, v[i]);
  };
  fetch();
  store(0);
  __syncthreads();
  for (int tile = 0; tile < tiles; tile++) {
    const int buffer = tile % 2;
    if (tile + 1 < tiles) fetch();
#pragma unroll
    for (int k = 0; k < BK; k++) {
      float x[8], y[TN];
      *(float4*)x = *(float4*)&as[buffer][k][4 * ty];
      *(float4*)(x + 4) = *(float4*)&as[buffer][k][64 + 4 * ty];
#pragma unroll
      for (int j = 0; j < TN; j += CHUNK) {
        if (CHUNK == 4)
          *(float4*)(y + j) = *(float4*)&bs[buffer][k][16 * j + 4 * tx];
        else
          *(float2*)(y + j) = *(float2*)&bs[buffer][k][16 * j + 2 * tx];
      }
#pragma unroll
      for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < TN; j++) sum[i][j] += x[i] * y[j];
    }
    if (tile + 1 < tiles) store(buffer ^ 1);
    __syncthreads();
  }
}

// For each of this thread's rows of the tile: begin(row), an address or null; the columns at n0 are written there.
template <class F> __forceinline__ void finish(const float (&sum)[8][TN], int n0, int columns, F begin) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    float* to = begin(i / 4 * 64 + 4 * ty + i % 4);
    if (!to) continue;
#pragma unroll
    for (int j = 0; j < TN; j += CHUNK) {
      const int n = n0 + 16 * j + CHUNK * tx;
      if (n >= columns) continue;  // columns are a multiple of 4
      if (CHUNK == 4)
        *(float4*)(to + n) = *(float4*)&sum[i][j];
      else
        *(float2*)(to + n) = *(float2*)&sum[i][j];
    }
  }
}

#if __CUDA_ARCH__ >= 1200
#define RESIDENT (BN == 128 ? 1 : 2)  // blocks of an SM: 128 registers are too few there
#else
#define RESIDENT 2
#endif

// y[(n, p, q), k]
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    fprop_vectorised(const float* x, const float* w, float* y, const __grid_constant__ Conv z) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int pixels = z.N * z.P * z.Q;
  Windows a(x, z, m0);
  Filters b(w, z, n0);
  float sum[8][TN] = {};
  multiply(a, b, (z.R * z.S * z.C + BK - 1) / BK, sum);
  finish(sum, n0, z.K, [=](int row) { return m0 + row < pixels ? y + (m0 + row) * z.K : nullptr; });
}

// dx[(n, h, w), c]; w lies as (K, R, S, C)
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    dgrad_vectorised(const float* dy, const float* w, float* dx, const __grid_constant__ Conv z) {
  __shared__ Taps taps;
  const int across = (z.C + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int h0 = blockIdx.y / z.v, w0 = blockIdx.y % z.v;  // the class: h = h0 + u * row, w = w0 + v * column
  const int rows = (z.H - h0 + z.u - 1) / z.u, columns = (z.W - w0 + z.v - 1) / z.v;
  if (m0 >= z.N * rows * columns) return;  // a class of fewer pixels than the largest
  if (threadIdx.x == 0) taps.find(z, h0, w0);
  __syncthreads();
  Upstream a(dy, z, taps, m0, rows, columns);
  FiltersAcross b(w, z, taps, n0);
  float sum[8][TN] = {};
  multiply(a, b, (taps.count * z.K + BK - 1) / BK, sum);
  finish(sum, n0, z.C, [=](int row) {
    const int m = m0 + row, at = w0 + m % columns * z.v, h = h0 + m / columns % rows * z.u, n = m / columns / rows;
    return n < z.N ? dx + ((n * z.H + h) * z.W + at) * z.C : nullptr;
  });
}

// parts[slice = blockIdx.y, j = (r, s, c), k] = sum over the slice's pixels
extern "C" __global__ void __launch_bounds__(THREADS, BN == 128 ? 1 : 2)  // it does not fit into 128 registers
    wgrad_vectorised(const float* x, const float* dy, float* parts, const __grid_constant__ Conv z, int pixels) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int weights = z.R * z.S * z.C, first = blockIdx.y * pixels, last = min(first + pixels, z.N * z.P * z.Q);
  WindowsAcross a(x, z, m0, first, last);
  UpstreamAcross b(dy, z, n0, first, last);
  float sum[8][TN] = {};
  multiply(a, b, (last - first + BK - 1) / BK, sum);
  float* part = parts + (size_t)blockIdx.y * weights * z.K;
  finish(sum, n0, z.K, [=](int row) { return m0 + row < weights ? part + (m0 + row) * z.K : nullptr; });
}

// dw[k, c, r, s] = sum over slices of parts[slice, r, s, c, k], for the c < Cg that are no padding
extern "C" __global__ void __launch_bounds__(256)
    wgrad_sum_jk(const float* parts, float* dw, const __grid_constant__ Conv z, int slices, int sharers) {
  wgrad_sum(parts, slices, sharers, z, [=](int i, float sum) { dw[i] = sum; });
}
