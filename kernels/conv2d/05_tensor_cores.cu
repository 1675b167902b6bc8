// Step 5: tensor cores: fp16 and bf16, and fp32 in the arithmetic of TF32, all added up in fp32.
//
// What changed from step 4, and why:
// - mma.sync multiplies 16 x 16 by 16 x 8 in one instruction of a warp: 16 times the products per cycle of plain fp16.
// - Shared memory would be the limit now. ldmatrix reads four 8 x 8 matrices at once, and pieces of 16 bytes are swizzled
//   (exclusive or with the row) so that its eight rows lie in different banks, without padding.
// - cp.async copies from memory to shared memory without a detour through registers, which the sums need; three tiles are
//   under way, because a tile is multiplied faster than memory answers.
// - Where pieces run along the rows of a tile (wgrad, dgrad's weights) ldmatrix transposes while it reads.
//
// With -DNUMBER=float there are two ways to be less than fp32, both only for those who ask: -DSPLIT=1 rounds both factors to
// TF32 (10 digits after the point); -DSPLIT=3 writes each as a sum of two such numbers and adds up three of the four products
// (a_small b_small is lost), which leaves errors of 2^-22. ldmatrix cannot transpose 32-bit numbers, so that fragments which run
// along the rows are read number by number.
//
// A tile is 128 rows x COLUMNS, 64 bytes deep; include/conv_tiles.cuh says where its numbers come from. 8 warps, 4 x 2, each
// with 32 rows and half of the columns. Needs one group, C and K multiples of V (fprop pads channels with zeros), at most 256
// taps.
// The copy, swizzle and fragment layouts follow the PTX ISA; cutlass's sm_80 kernels are organised alike.
#include "types.cuh"
#include "mma.cuh"

#ifndef COLUMNS
#define COLUMNS 128
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
using number = T;
constexpr int BM = 128, BN = COLUMNS, BK = 64 / sizeof(T), THREADS = 256, STAGES = 3;
constexpr int WARP_COLUMNS = BN / 2, NT = WARP_COLUMNS / 8;  // matrices of 8 columns per warp
#include "conv_tiles.cuh"
constexpr int STEP = 2 * V;  // depths of one mma
constexpr int RESIDENT = SPLIT == 3 && BN == 128 ? 1 : 2;  // blocks of an SM; split fragments do not fit into 128 registers

constexpr int A_SIZE = BM * BK, B_SIZE = BN * BK;  // numbers of a stage; STAGES * (A_SIZE + B_SIZE) are asked for at launch
extern __shared__ __align__(128) unsigned char shared_memory[];

// Where piece `chunk` (V numbers) of a tile's line lies. Along the sum a line is a row of 4 pieces, else a depth of WIDTH / V.
template <int WIDTH> __forceinline__ int place(const AlongSum<WIDTH>&, int row, int chunk) {
  return row * BK + ((chunk ^ (row >> 1 & 3)) * V);
}
template <int WIDTH> __forceinline__ int place(const AlongRows<WIDTH>&, int depth, int chunk) {
  const int turn = sizeof(T) == 4 ? 2 * (depth & 3) : WIDTH == 32 ? depth >> 1 & 3 : depth & 7;
  return depth * WIDTH + ((chunk ^ turn) * V);
}
template <int WIDTH> __forceinline__ int place_piece(const AlongSum<WIDTH>& l, int i) {
  return place(l, l.row(i), l.depth(i) / V);
}
template <int WIDTH> __forceinline__ int place_piece(const AlongRows<WIDTH>& l, int i) {
  return place(l, l.depth(i), l.row(i) / V);
}

// A float of a tile whose pieces run along its rows.
template <int WIDTH> __forceinline__ unsigned bits(const AlongRows<WIDTH>& l, const T* tile, int depth, int row) {
  return *(const unsigned*)(tile + place(l, depth, row / V) + row % V);
}

// The fragment of a for rows row0 ... row0 + 15 and depths k0 ... k0 + STEP - 1.
template <int WIDTH>
__forceinline__ void fragment_a(const AlongSum<WIDTH>& l, unsigned (&r)[4], const T* tile, int row0, int k0) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(r, tile + place(l, row0 + lane % 16, k0 / V + lane / 16));
}
template <int WIDTH>
__forceinline__ void fragment_a(const AlongRows<WIDTH>& l, unsigned (&r)[4], const T* tile, int row0, int k0) {
  const int lane = threadIdx.x % 32;
  if (sizeof(T) == 4) {
    const int k = k0 + lane % 4, row = row0 + lane / 4;
    r[0] = bits(l, tile, k, row), r[1] = bits(l, tile, k, row + 8);
    r[2] = bits(l, tile, k + 4, row), r[3] = bits(l, tile, k + 4, row + 8);
  } else {
    load_matrices<true>(r, tile + place(l, k0 + lane % 8 + lane / 16 * 8, row0 / V + lane / 8 % 2));
  }
}

// The fragments of b for columns n0 ... n0 + 7 in r[0], r[1] and n0 + 8 ... n0 + 15 in r[2], r[3].
template <int WIDTH>
__forceinline__ void fragment_b(const AlongSum<WIDTH>& l, unsigned (&r)[4], const T* tile, int n0, int k0) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(r, tile + place(l, n0 + lane % 8 + lane / 16 * 8, k0 / V + lane / 8 % 2));
}
template <int WIDTH>
__forceinline__ void fragment_b(const AlongRows<WIDTH>& l, unsigned (&r)[4], const T* tile, int n0, int k0) {
  const int lane = threadIdx.x % 32;
  if (sizeof(T) == 4) {
    const int k = k0 + lane % 4, n = n0 + lane / 4;
    r[0] = bits(l, tile, k, n), r[1] = bits(l, tile, k + 4, n);
    r[2] = bits(l, tile, k, n + 8), r[3] = bits(l, tile, k + 4, n + 8);
  } else {
    load_matrices<true>(r, tile + place(l, k0 + lane % 16, n0 / V + lane / 16));
  }
}

// What of a fragment TF32 can hold, and what it leaves.
template <int N> __forceinline__ void split(const unsigned (&x)[N], unsigned (&big)[N], unsigned (&small)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    big[i] = tf32(__uint_as_float(x[i]));
    small[i] = tf32(__uint_as_float(x[i]) - __uint_as_float(big[i]));
  }
}

// d += a b, by one product or, of split floats, by three, the small ones first.
__forceinline__ void product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if (sizeof(T) == 2) return mma<T>(d, a, b);
  unsigned a_big[4], a_small[4], b_big[2], b_small[2];
  split(a, a_big, a_small);
  split(b, b_big, b_small);
  if (SPLIT == 3) {
    mma<T>(d, a_small, b_big);
    mma<T>(d, a_big, b_small);
  }
  mma<T>(d, a_big, b_big);
}

// sum[i][j] += rows 16 i ... by columns 8 j ... of this warp's part, over all tiles. valid: any address that may be read.
template <class A, class B>
__forceinline__ void multiply(A& a, B& b, int tiles, const void* valid, float (&sum)[2][NT][4]) {
  T* const as = (T*)shared_memory;
  T* const bs = as + STAGES * A_SIZE;
  const int warp = threadIdx.x / 32, row0 = warp / 2 * 32, n0 = warp % 2 * WARP_COLUMNS;
  auto fetch = [&](int tile) {
    if (tile < tiles) {
      const int stage = tile % STAGES;
#pragma unroll
      for (int i = 0; i < A::LOADS; i++) copy_async(as + stage * A_SIZE + place_piece(a, i), a.at(i), valid);
#pragma unroll
      for (int i = 0; i < B::LOADS; i++)
        if (B::active()) copy_async(bs + stage * B_SIZE + place_piece(b, i), b.at(i), valid);
      a.next(), b.next();
    }
    copies_begun();  // an empty group at the end, so that counting them stays right
  };
  for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);
  for (int tile = 0; tile < tiles; tile++) {
    copies_done<STAGES - 2>();
    __syncthreads();  // this tile has arrived for all; and all are done with the one that fetch overwrites
    fetch(tile + STAGES - 1);
    const T *x = as + tile % STAGES * A_SIZE, *y = bs + tile % STAGES * B_SIZE;
#pragma unroll
    for (int k0 = 0; k0 < BK; k0 += STEP) {
      unsigned u[2][4], v[NT / 2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) fragment_a(a, u[i], x, row0 + 16 * i, k0);
#pragma unroll
      for (int j = 0; j < NT / 2; j++) fragment_b(b, v[j], y, n0 + 16 * j, k0);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) product(sum[i][j], u[i], {v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]});
    }
  }
}

// For each of this thread's rows of the tile: begin(row), an address or null; two columns at a time are written there.
template <class S, class F>
__forceinline__ void finish(const float (&sum)[2][NT][4], int n0, int columns, F begin) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  struct alignas(2 * sizeof(S)) Two { S a, b; };
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      S* to = begin(warp / 2 * 32 + 16 * i + 8 * half + lane / 4);
      if (!to) continue;
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const int n = n0 + warp % 2 * WARP_COLUMNS + 8 * j + lane % 4 * 2;  // columns are even
        if (n < columns) *(Two*)(to + n) = {narrow<S>(sum[i][j][2 * half]), narrow<S>(sum[i][j][2 * half + 1])};
      }
    }
}

// y[(n, p, q), k]
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    fprop_tensor(const T* x, const T* w, T* y, const __grid_constant__ Conv z) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int pixels = z.N * z.P * z.Q;
  Windows a(x, z, m0);
  Filters b(w, z, n0);
  float sum[2][NT][4] = {};
  multiply(a, b, (z.R * z.S * z.C + BK - 1) / BK, x, sum);
  finish<T>(sum, n0, z.K, [=](int row) { return m0 + row < pixels ? y + (m0 + row) * z.K : nullptr; });
}

// dx[(n, h, w), c]; w lies as (K, R, S, C)
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    dgrad_tensor(const T* dy, const T* w, T* dx, const __grid_constant__ Conv z) {
  __shared__ Taps taps;
  const int across = (z.C + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int h0 = blockIdx.y / z.v, w0 = blockIdx.y % z.v;  // the class: h = h0 + u * row, w = w0 + v * column
  const int rows = (z.H - h0 + z.u - 1) / z.u, columns = (z.W - w0 + z.v - 1) / z.v;
  if (m0 >= z.N * rows * columns) return;  // a class of fewer pixels than the largest
  if (threadIdx.x == 0) taps.find(z, h0, w0);
  __syncthreads();
  Upstream a(dy, z, taps, m0, rows, columns);
  FiltersAcross b(w, z, taps, n0);
  float sum[2][NT][4] = {};
  multiply(a, b, (taps.count * z.K + BK - 1) / BK, dy, sum);
  finish<T>(sum, n0, z.C, [=](int row) {
    const int m = m0 + row, at = w0 + m % columns * z.v, h = h0 + m / columns % rows * z.u, n = m / columns / rows;
    return n < z.N ? dx + ((n * z.H + h) * z.W + at) * z.C : nullptr;
  });
}

// parts[slice = blockIdx.y, j = (r, s, c), k] = sum over the slice's pixels
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    wgrad_tensor(const T* x, const T* dy, float* parts, const __grid_constant__ Conv z, int pixels) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int weights = z.R * z.S * z.C, first = blockIdx.y * pixels, last = min(first + pixels, z.N * z.P * z.Q);
  WindowsAcross a(x, z, m0, first, last);
  UpstreamAcross b(dy, z, n0, first, last);
  float sum[2][NT][4] = {};
  multiply(a, b, (last - first + BK - 1) / BK, x, sum);
  float* part = parts + (size_t)blockIdx.y * weights * z.K;
  finish<float>(sum, n0, z.K, [=](int row) { return m0 + row < weights ? part + (m0 + row) * z.K : nullptr; });
}

// dw[k, c, r, s] = sum over slices of parts[slice, r, s, c, k], for the c < Cg that are no padding
extern "C" __global__ void __launch_bounds__(256)
    wgrad_sum_jk(const float* parts, T* dw, const __grid_constant__ Conv z, int slices) {
  wgrad_sum(parts, slices, z, [=](int i, float sum) { dw[i] = narrow<T>(sum); });
}
