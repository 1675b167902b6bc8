// Step 6: batch normalisation and ReLU inside the convolution.
//
// What changed from step 5, and why: tensor cores are so fast that a block of a ResNet waits for memory most of its time, and
// most of what moves there is BatchNorm's: every activation is read for its statistics, read again and written normalised, and
// both once more on the way back. Here
//
// - fprop reads x as the convolution before left it, and normalises and activates it on its way: relu(scale x + shift), before
//   which nothing has to be stored. Padding stays zero: it is what the convolution would have added after that.
// - fprop's sums, still in registers, give the statistics of y that the next one needs.
// - dgrad's sums are the gradient of relu(scale x + shift): it is masked, written, and added up for dgamma and dbeta before it
//   leaves the registers.
// - BatchNorm's own backward is dx = f0 g + f1 x + f2 per channel, once those sums are known: the convolution before (its dgrad
//   and its wgrad) computes it while it reads g and x. wgrad also makes its activation again, in place of a stored one.
//
// Pieces are changed in shared memory, by the thread that copied them (mma_tiles.cuh): it knows what was padding. Sums of a
// tile of 128 pixels are formed in a fixed order: thread, warp (shuffles), block (shared memory), and a small second kernel over
// the tiles: no atomics, the same bits on every run. Variances come from means and squared distances of tiles, merged as in
// batchnorm2d.cu, never from E[x^2] - E[x]^2, which cancels.
//
// Not fused: the addition of the skip, which has to be stored anyway (batchnorm2d.cu does it in one pass).
// cuDNN's names: scale-bias-ReLU-conv-genstats, dgrad-dReLU-dBN, BN-wgrad.
#include "mma_tiles.cuh"

constexpr int BLOCKS = BN == 128 ? 1 : 2;  // of an SM, where 128 registers are too few: dgrad and wgrad, with two operands

// act(f0 x + f1 x2 + f2) of every piece that is no padding; f1 x2 only with two operands, ReLU only with one. x2 is a tensor
// like x. The V factors are those of the piece's channels; f0 is null where pieces stay as they are.
template <int COUNT> struct Affine {
  static constexpr int OPERANDS = COUNT;
  const float *f0, *f1, *f2;
  const T *x, *x2;
  unsigned copied[STAGES - 1];  // of the tiles under way, the oldest first: which pieces are no padding,
  int channel[STAGES - 1];      // and their first channel
  __forceinline__ Affine(const float* f0, const float* f1, const float* f2, const T* x, const T* x2)
      : f0(f0), f1(f1), f2(f2), x(x), x2(x2), copied(), channel() {}
  __forceinline__ void forget_oldest() {
#pragma unroll
    for (int t = 0; t < STAGES - 2; t++) copied[t] = copied[t + 1], channel[t] = channel[t + 1];
    copied[STAGES - 2] = 0;
  }
  template <class L> __forceinline__ void copy(const L& l, int i, const T* from, T* to, const void* valid) {
    copied[STAGES - 2] |= (from != nullptr) << i;
    channel[STAGES - 2] = l.channel();
    if (COUNT == 2 && f0) copy_async(to, from ? x2 + (from - x) : nullptr, valid);
  }
  template <class L> __forceinline__ void change(const L& l, T* tile) {
    if (!f0 || !copied[0]) return;
    struct alignas(16) Piece { T v[V]; };
    float scale[V], slope[V], shift[V];
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      *(float4*)(scale + v) = *(const float4*)(f0 + channel[0] + v);
      *(float4*)(shift + v) = *(const float4*)(f2 + channel[0] + v);
      if (COUNT == 2) *(float4*)(slope + v) = *(const float4*)(f1 + channel[0] + v);
    }
#pragma unroll
    for (int i = 0; i < L::LOADS; i++) {
      if (!(copied[0] >> i & 1)) continue;
      T* const at = tile + place_piece(l, i);
      Piece p = *(Piece*)at, p2;
      if (COUNT == 2) p2 = *(Piece*)(at + L::SIZE);
#pragma unroll
      for (int v = 0; v < V; v++) {
        float u = fmaf(scale[v], wide(p.v[v]), shift[v]);
        if (COUNT == 2) u = fmaf(slope[v], wide(p2.v[v]), u);
        p.v[v] = narrow<T>(COUNT == 1 && u <= 0 ? 0.f : u);  // a NaN stays
      }
      *(Piece*)at = p;
    }
  }
};

// total[k][n] = sum over the tile's rows of what add(i, half, j, sums) adds to sums[k][odd], for column n = (j, odd): by the
// whole block. i, half, j: as in `finish`.
template <int COUNT, class F> __forceinline__ void column_sums(float (&total)[COUNT][BN], F add) {
  __shared__ float parts[COUNT][4][BN];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    float sums[COUNT][2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) add(i, half, j, sums);
#pragma unroll
    for (int k = 0; k < COUNT; k++)
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        float v = sums[k][odd];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) v += __shfl_xor_sync(0xffffffff, v, step);  // lanes of the same columns
        if (lane < 4) parts[k][warp / 2][warp % 2 * WARP_COLUMNS + 8 * j + 2 * lane + odd] = v;
      }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COUNT * BN; i += THREADS) {
    const int k = i / BN, n = i % BN;
    total[k][n] = (parts[k][0][n] + parts[k][1][n]) + (parts[k][2][n] + parts[k][3][n]);
  }
  __syncthreads();
}

// partial[tile, k, n0 + n] = total[k][n], for the columns that there are.
__forceinline__ void put_totals(const float (&total)[2][BN], float* partial, int tile, int n0, int columns) {
  for (int i = threadIdx.x; i < 2 * BN; i += THREADS)
    if (n0 + i % BN < columns) partial[(size_t)(2 * tile + i / BN) * columns + n0 + i % BN] = total[i / BN][i % BN];
}

__forceinline__ int row_of(int i, int half) { return threadIdx.x / 64 * 32 + 16 * i + 8 * half + threadIdx.x % 32 / 4; }
__forceinline__ int column_of(int j) { return threadIdx.x / 32 % 2 * WARP_COLUMNS + 8 * j + threadIdx.x % 4 * 2; }

// y[(n, p, q), k] of relu(scale x + shift), or of x where scale is null; partial (tiles of pixels, 2, K): each tile's mean, and
// sum of squared distances from it.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    fprop_fused(const T* x, const float* scale, const float* shift, const T* w, T* y, float* partial,
                const __grid_constant__ Conv z) {
  __shared__ float total[1][BN], moments[2][BN];
  const int across = (z.K + BN - 1) / BN, tile = blockIdx.x / across, m0 = tile * BM, n0 = blockIdx.x % across * BN;
  const int pixels = z.N * z.P * z.Q, rows = min(BM, pixels - m0);
  Windows a(x, z, m0);
  Filters b(w, z, n0);
  float sum[2][NT][4] = {};
  multiply(a, b, (z.R * z.S * z.C + BK - 1) / BK, x, sum, Affine<1>(scale, nullptr, shift, x, nullptr), AsItIs());
  finish<T>(sum, n0, z.K, [=](int row) { return row < rows ? y + (m0 + row) * z.K : nullptr; });
  column_sums<1>(total, [&](int i, int half, int j, float (&v)[1][2]) {  // rows beyond the last are zero
    v[0][0] += sum[i][j][2 * half], v[0][1] += sum[i][j][2 * half + 1];
  });
  for (int n = threadIdx.x; n < BN; n += THREADS) moments[0][n] = total[0][n] / rows;
  __syncthreads();
  column_sums<1>(total, [&](int i, int half, int j, float (&v)[1][2]) {
    if (row_of(i, half) >= rows) return;
    const float d0 = sum[i][j][2 * half] - moments[0][column_of(j)];
    const float d1 = sum[i][j][2 * half + 1] - moments[0][column_of(j) + 1];
    v[0][0] += d0 * d0, v[0][1] += d1 * d1;
  });
  for (int n = threadIdx.x; n < BN; n += THREADS) moments[1][n] = total[0][n];
  __syncthreads();
  put_totals(moments, partial, tile, n0, z.K);
}

// g[(n, h, w), c] = d where scale x + shift > 0, else 0, for the gradient d of relu(scale x + shift); d itself where x is null.
// d is the dgrad of f0 dy + f1 y + f2, or of dy where f (3, K) is null. partial (classes, tiles of pixels, 2, C): each tile's
// sums of g and of g (x - mean), where x is given.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    dgrad_fused(const T* dy, const T* y, const float* f, const T* w, const T* x, const float* scale, const float* shift,
                const float* mean, T* g, float* partial, const __grid_constant__ Conv z) {
  __shared__ Taps taps;
  __shared__ float total[2][BN];
  const int across = (z.C + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int tile = blockIdx.y * (gridDim.x / across) + blockIdx.x / across;
  const int h0 = blockIdx.y / z.v, w0 = blockIdx.y % z.v;  // the class: h = h0 + u * row, w = w0 + v * column
  const int rows = (z.H - h0 + z.u - 1) / z.u, columns = (z.W - w0 + z.v - 1) / z.v;
  const bool sums = x != nullptr;
  if (m0 >= z.N * rows * columns) {  // a class of fewer pixels than the largest
    for (int i = threadIdx.x; i < 2 * BN; i += THREADS) total[i / BN][i % BN] = 0;
    __syncthreads();
    if (sums) put_totals(total, partial, tile, n0, z.C);
    return;
  }
  if (threadIdx.x == 0) taps.find(z, h0, w0);
  __syncthreads();
  Upstream a(dy, z, taps, m0, rows, columns);
  FiltersAcross b(w, z, taps, n0);
  float sum[2][NT][4] = {};
  multiply(a, b, (taps.count * z.K + BK - 1) / BK, dy, sum, Affine<2>(f, f + z.K, f + 2 * z.K, dy, y), AsItIs());
  int offset[2][2];  // of this thread's rows in g and x; -1 beyond the last
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int m = m0 + row_of(i / 2, i % 2), n = m / columns / rows;
    offset[i / 2][i % 2] =
        n < z.N ? ((n * z.H + h0 + m / columns % rows * z.u) * z.W + w0 + m % columns * z.v) * z.C : -1;
  }
  struct alignas(2 * sizeof(T)) Two { T a, b; };
  column_sums<2>(total, [&](int i, int half, int j, float (&v)[2][2]) {
    const int c = n0 + column_of(j);
    if (offset[i][half] < 0 || c >= z.C) return;
    float d[2] = {sum[i][j][2 * half], sum[i][j][2 * half + 1]};
    if (sums) {
      const Two at = *(const Two*)(x + offset[i][half] + c);
      const float u[2] = {wide(at.a), wide(at.b)};
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        if (!(fmaf(scale[c + odd], u[odd], shift[c + odd]) > 0)) d[odd] = 0;
        v[0][odd] += d[odd];
        v[1][odd] += d[odd] * (u[odd] - mean[c + odd]);
      }
    }
    *(Two*)(g + offset[i][half] + c) = {narrow<T>(d[0]), narrow<T>(d[1])};
  });
  if (sums) put_totals(total, partial, tile, n0, z.C);
}

// parts[slice = blockIdx.y, j = (r, s, c), k] = sum over the slice's pixels, of relu(scale x + shift) (or x) and f0 dy + f1 y + f2
// (or dy); `wgrad_sum_jk` of step 5 adds the slices up.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    wgrad_fused(const T* x, const float* scale, const float* shift, const T* dy, const T* y, const float* f, float* parts,
                const __grid_constant__ Conv z, int pixels) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int weights = z.R * z.S * z.C, first = blockIdx.y * pixels, last = min(first + pixels, z.N * z.P * z.Q);
  WindowsAcross a(x, z, m0, first, last);
  UpstreamAcross b(dy, z, n0, first, last);
  float sum[2][NT][4] = {};
  multiply(a, b, (last - first + BK - 1) / BK, x, sum, Affine<1>(scale, nullptr, shift, x, nullptr),
           Affine<2>(f, f + z.K, f + 2 * z.K, dy, y));
  float* part = parts + (size_t)blockIdx.y * weights * z.K;
  finish<float>(sum, n0, z.K, [=](int row) { return m0 + row < weights ? part + (m0 + row) * z.K : nullptr; });
}

// The small kernels over the tiles' sums: blocks of 8 channels (threadIdx.x) by 64 threads, which share the tiles.
constexpr int SHARERS = 64;
template <class F> __forceinline__ float shared_sum(int tiles, F of) {
  __shared__ float sums[SHARERS][8];
  float v = 0;
  for (int tile = threadIdx.y; tile < tiles; tile += SHARERS) v += of(tile);
  sums[threadIdx.y][threadIdx.x] = v;
  for (int half = SHARERS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.y < half) sums[threadIdx.y][threadIdx.x] += sums[threadIdx.y + half][threadIdx.x];
  }
  __syncthreads();
  return sums[0][threadIdx.x];  // which the next sum leaves alone: each F has an array of its own
}

// Mean and biased variance of every channel, from the moments of tiles of 128 rows:
//     mean = sum of n_t mean_t / n    n var = sum of (M2_t + n_t (mean_t - mean)^2)
extern "C" __global__ void __launch_bounds__(8 * SHARERS)
    fused_statistics(const float* partial, float* mean, float* var, int rows, int channels) {
  const int c = blockIdx.x * 8 + threadIdx.x, at = min(c, channels - 1), tiles = (rows + BM - 1) / BM;
  auto count = [=](int tile) { return (float)min(BM, rows - tile * BM); };
  auto value = [=](int tile, int k) { return partial[(size_t)(2 * tile + k) * channels + at]; };
  const float m = shared_sum(tiles, [=](int tile) { return count(tile) * value(tile, 0); }) / rows;
  const float m2 = shared_sum(tiles, [=](int tile) {
    const float d = value(tile, 0) - m;
    return fmaf(count(tile) * d, d, value(tile, 1));
  });
  if (threadIdx.y == 0 && c < channels) mean[c] = m, var[c] = m2 / rows;
}

// dbeta, dgamma, and the f (3, C) of dx = f0 g + f1 x + f2, from the tiles' sums of g and g (x - mean):
//     dx = scale (g - dbeta / m - x_hat dgamma / m),  x_hat = (x - mean) inv_std,  m rows
extern "C" __global__ void __launch_bounds__(8 * SHARERS)
    fused_bn_sums(const float* partial, const float* scale, const float* mean, const float* inv_std, float* dgamma,
                  float* dbeta, float* f, int tiles, int rows, int channels) {
  const int c = blockIdx.x * 8 + threadIdx.x, at = min(c, channels - 1);
  const float sum = shared_sum(tiles, [=](int tile) { return partial[(size_t)(2 * tile) * channels + at]; });
  const float product = shared_sum(tiles, [=](int tile) { return partial[(size_t)(2 * tile + 1) * channels + at]; });
  if (threadIdx.y || c >= channels) return;
  const float s = scale[c], gamma_part = product * inv_std[c], slope = -s * inv_std[c] * gamma_part / rows;
  dbeta[c] = sum, dgamma[c] = gamma_part;
  f[c] = s, f[channels + c] = slope, f[2 * channels + c] = -s * sum / rows - slope * mean[c];
}
