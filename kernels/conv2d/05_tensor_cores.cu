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
// The tiles and the loop over them are in include/mma_tiles.cuh, which step 6 uses too. Needs one group, C and K multiples of V
// (fprop pads channels with zeros), at most 256 taps.
// The copy, swizzle and fragment layouts follow the PTX ISA; cutlass's sm_80 kernels are organised alike.
#include "mma_tiles.cuh"

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
    wgrad_sum_jk(const float* parts, T* dw, const __grid_constant__ Conv z, int slices, int sharers) {
  wgrad_sum(parts, slices, sharers, z, [=](int i, float sum) { dw[i] = narrow<T>(sum); });
}
