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
// Needs one group, C and K multiples of 4, and at most 256 taps in dgrad. A tile is 128 rows x COLUMNS, BK deep; rows are
// pixels, or in wgrad the weights' (r, s, c). Loaders say where the numbers of a tile come from.
// Source of the tiling: Boehm 2022, "How to optimize a CUDA matmul kernel"; of the classes: cutlass's strided dgrad.
#include "conv.cuh"

#ifndef COLUMNS
#define COLUMNS 128
#endif
constexpr int BM = 128, BN = COLUMNS, THREADS = 256;
constexpr int BK = BN == 128 ? 8 : 16;  // 64 sums leave registers for no more than 8 deep
constexpr int TN = BN / 16, CHUNK = TN < 4 ? TN : 4;
constexpr float4 ZERO = {0, 0, 0, 0};

// A tile whose pieces of 4 run along the sum: they are put into a column.
template <int WIDTH> struct AlongSum {
  static constexpr int PIECES = BK / 4;
  static constexpr int LOADS = (WIDTH * BK / 4 + THREADS - 1) / THREADS;
  __forceinline__ static bool active() { return WIDTH * BK / 4 >= THREADS || threadIdx.x < WIDTH * BK / 4; }
  __forceinline__ static int row(int i) { return threadIdx.x / PIECES + i * (THREADS / PIECES); }
  __forceinline__ static int depth(int) { return threadIdx.x % PIECES * 4; }
  __forceinline__ static void put(float (*tile)[WIDTH + 4], int i, float4 v) {
    const int k = depth(i), r = row(i);
    tile[k][r] = v.x, tile[k + 1][r] = v.y, tile[k + 2][r] = v.z, tile[k + 3][r] = v.w;
  }
};

// A tile whose pieces of 4 run along its rows.
template <int WIDTH> struct AlongRows {
  static constexpr int LOADS = (WIDTH * BK / 4 + THREADS - 1) / THREADS;
  __forceinline__ static bool active() { return WIDTH * BK / 4 >= THREADS || threadIdx.x < WIDTH * BK / 4; }
  __forceinline__ static int row(int) { return threadIdx.x % (WIDTH / 4) * 4; }
  __forceinline__ static int depth(int i) { return threadIdx.x / (WIDTH / 4) + i * (THREADS / (WIDTH / 4)); }
  __forceinline__ static void put(float (*tile)[WIDTH + 4], int i, float4 v) { *(float4*)&tile[depth(i)][row(i)] = v; }
};

// sum[i][j] += over all depths, for this thread's rows i and columns j of the tile.
template <class A, class B> __forceinline__ void multiply(A& a, B& b, int tiles, float (&sum)[8][TN]) {
  __shared__ __align__(16) float as[2][BK][BM + 4], bs[2][BK][BN + 4];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  float4 u[A::LOADS], v[B::LOADS];
  auto fetch = [&] {
#pragma unroll
    for (int i = 0; i < A::LOADS; i++) u[i] = a.load(i);
#pragma unroll
    for (int i = 0; i < B::LOADS; i++) v[i] = B::active() ? b.load(i) : ZERO;
    a.next(), b.next();
  };
  auto put = [&](int buffer) {
#pragma unroll
    for (int i = 0; i < A::LOADS; i++) A::put(as[buffer], i, u[i]);
#pragma unroll
    for (int i = 0; i < B::LOADS; i++)
      if (B::active()) B::put(bs[buffer], i, v[i]);
  };
  fetch();
  put(0);
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
    if (tile + 1 < tiles) put(buffer ^ 1);
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

// fprop's rows: pixels (n, p, q) of y; depths j = (r, s, c) of the window of x.
struct Windows : AlongSum<BM> {
  const float* x;
  const Conv& z;
  int h0[LOADS], w0[LOADS], image[LOADS], r, s, c;
  __forceinline__ Windows(const float* x, const Conv& z, int m0) : x(x), z(z) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int m = m0 + row(i), q = m % z.Q, p = m / z.Q % z.P, n = m / z.Q / z.P;
      h0[i] = n < z.N ? p * z.u - z.a : z.H;  // a row beyond the last pixel sees nothing
      w0[i] = q * z.v - z.b, image[i] = n * z.H;
    }
    r = s = 0, c = depth(0);
    settle();
  }
  __forceinline__ void settle() {
    while (c >= z.C && r < z.R) {
      c -= z.C;
      if (++s == z.S) s = 0, r++;
    }
  }
  __forceinline__ float4 load(int i) {
    const int h = h0[i] + r * z.l, w = w0[i] + s * z.m;
    const bool in = h >= 0 && h < z.H && w >= 0 && w < z.W && r < z.R;
    return in ? *(const float4*)(x + ((image[i] + h) * z.W + w) * z.C + c) : ZERO;
  }
  __forceinline__ void next() { c += BK, settle(); }
};

// fprop's columns: filters; depths j = (r, s, c), as weights (K, R, S, C) lie.
struct Filters : AlongSum<BN> {
  const float* w;
  int n0, filters, j, size;
  __forceinline__ Filters(const float* w, const Conv& z, int n0)
      : w(w), n0(n0), filters(z.K), j(depth(0)), size(z.R * z.S * z.C) {}
  __forceinline__ float4 load(int i) {
    const int k = n0 + row(i);
    return k < filters && j < size ? *(const float4*)(w + k * size + j) : ZERO;
  }
  __forceinline__ void next() { j += BK; }
};

// y[(n, p, q), k]
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    fprop_vectorised(const float* x, const float* w, float* y, const __grid_constant__ Conv z) {
  const int across = (z.K + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int pixels = z.N * z.P * z.Q;
  Windows a(x, z, m0);
  Filters b(w, z, n0);
  float sum[8][TN] = {};
  multiply(a, b, (z.R * z.S * z.C + BK - 1) / BK, sum);
  finish(sum, n0, z.K, [=](int row) { return m0 + row < pixels ? y + (m0 + row) * z.K : nullptr; });
}

// Of a class of pixels: the taps that meet it, and where in dy relative to (h / u, w / v).
struct Taps {
  int count, tap[256], dp[256], dq[256];
};

// dgrad's rows: the class's pixels (n, h, w) of dx; depths j = (tap, k) of dy.
struct Upstream : AlongSum<BM> {
  const float* dy;
  const Conv& z;
  const Taps& taps;
  int h[LOADS], w[LOADS], image[LOADS], t, k;
  __forceinline__ Upstream(const float* dy, const Conv& z, const Taps& taps, int m0, int rows, int columns)
      : dy(dy), z(z), taps(taps) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      const int m = m0 + row(i);
      w[i] = m % columns, h[i] = m / columns % rows, image[i] = m / columns / rows;
    }
    t = 0, k = depth(0);
    settle();
  }
  __forceinline__ void settle() {
    while (k >= z.K && t < taps.count) k -= z.K, t++;
  }
  __forceinline__ float4 load(int i) {
    if (t >= taps.count || image[i] >= z.N) return ZERO;
    const int p = h[i] + taps.dp[t], q = w[i] + taps.dq[t];
    const bool in = p >= 0 && p < z.P && q >= 0 && q < z.Q;
    return in ? *(const float4*)(dy + ((image[i] * z.P + p) * z.Q + q) * z.K + k) : ZERO;
  }
  __forceinline__ void next() { k += BK, settle(); }
};

// dgrad's columns: channels, neighbours in memory; depths j = (tap, k).
struct FiltersAcross : AlongRows<BN> {
  const float* w;
  const Conv& z;
  const Taps& taps;
  int c, t[LOADS], k[LOADS];
  __forceinline__ FiltersAcross(const float* w, const Conv& z, const Taps& taps, int n0)
      : w(w), z(z), taps(taps), c(n0 + row(0)) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) t[i] = 0, k[i] = depth(i);
    settle();
  }
  __forceinline__ void settle() {
#pragma unroll
    for (int i = 0; i < LOADS; i++)
      while (k[i] >= z.K && t[i] < taps.count) k[i] -= z.K, t[i]++;
  }
  __forceinline__ float4 load(int i) {
    const bool in = c < z.C && t[i] < taps.count;
    return in ? *(const float4*)(w + (k[i] * z.R * z.S + taps.tap[t[i]]) * z.C + c) : ZERO;
  }
  __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < LOADS; i++) k[i] += BK;
    settle();
  }
};

#if __CUDA_ARCH__ >= 1200
#define RESIDENT (BN == 128 ? 1 : 2)  // blocks of an SM: 128 registers are too few there
#else
#define RESIDENT 2
#endif

// dx[(n, h, w), c]; w lies as (K, R, S, C)
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    dgrad_vectorised(const float* dy, const float* w, float* dx, const __grid_constant__ Conv z) {
  __shared__ Taps taps;
  const int across = (z.C + BN - 1) / BN, m0 = blockIdx.x / across * BM, n0 = blockIdx.x % across * BN;
  const int h0 = blockIdx.y / z.v, w0 = blockIdx.y % z.v;  // the class: h = h0 + u * row, w = w0 + v * column
  const int rows = (z.H - h0 + z.u - 1) / z.u, columns = (z.W - w0 + z.v - 1) / z.v;
  if (m0 >= z.N * rows * columns) return;  // a class of fewer pixels than the largest
  if (threadIdx.x == 0) {
    taps.count = 0;
    for (int tap = 0; tap < z.R * z.S; tap++) {
      const int pu = h0 + z.a - tap / z.S * z.l, qv = w0 + z.b - tap % z.S * z.m;
      if (pu % z.u || qv % z.v) continue;
      taps.tap[taps.count] = tap, taps.dp[taps.count] = pu / z.u, taps.dq[taps.count++] = qv / z.v;
    }
  }
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

// wgrad's rows: weights j = (r, s, c), neighbours in memory of x; depths: pixels (n, p, q) of y.
struct WindowsAcross : AlongRows<BM> {
  const float* x;
  const Conv& z;
  int h0, w0, c, pixel[LOADS], p[LOADS], q[LOADS], image[LOADS], last;
  __forceinline__ WindowsAcross(const float* x, const Conv& z, int m0, int first, int last) : x(x), z(z), last(last) {
    const int j = m0 + row(0), tap = j / z.C;
    c = j % z.C;
    h0 = tap < z.R * z.S ? tap / z.S * z.l - z.a : z.H;  // a row beyond the last weight sees nothing
    w0 = tap % z.S * z.m - z.b;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      pixel[i] = first + depth(i);
      q[i] = pixel[i] % z.Q, p[i] = pixel[i] / z.Q % z.P, image[i] = pixel[i] / z.Q / z.P;
    }
  }
  __forceinline__ float4 load(int i) {
    const int h = p[i] * z.u + h0, w = q[i] * z.v + w0;
    const bool in = pixel[i] < last && h >= 0 && h < z.H && w >= 0 && w < z.W;
    return in ? *(const float4*)(x + ((image[i] * z.H + h) * z.W + w) * z.C + c) : ZERO;
  }
  __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
      pixel[i] += BK, q[i] += BK;
      while (q[i] >= z.Q) {
        q[i] -= z.Q, p[i]++;
        if (p[i] == z.P) p[i] = 0, image[i]++;
      }
    }
  }
};

// wgrad's columns: filters, neighbours in memory of dy; depths: pixels.
struct UpstreamAcross : AlongRows<BN> {
  const float* dy;
  int filters, pixel[LOADS], last;
  __forceinline__ UpstreamAcross(const float* dy, const Conv& z, int n0, int first, int last)
      : dy(dy + n0 + row(0)), filters(z.K), last(n0 + row(0) < z.K ? last : 0) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) pixel[i] = first + depth(i);
  }
  __forceinline__ float4 load(int i) {
    return pixel[i] < last ? *(const float4*)(dy + pixel[i] * filters) : ZERO;
  }
  __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < LOADS; i++) pixel[i] += BK;
  }
};

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
    wgrad_sum_jk(const float* parts, float* dw, const __grid_constant__ Conv z, int slices) {
  const int taps = z.R * z.S, size = z.K * z.Cg * taps;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int k = i % z.K, tap = i / z.K % taps, c = i / z.K / taps;  // neighbouring threads read neighbours
    const float* part = parts + (size_t)(tap * z.C + c) * z.K + k;
    float sum = 0;
    for (int slice = 0; slice < slices; slice++) sum += part[(size_t)slice * taps * z.C * z.K];
    dw[(k * z.Cg + c) * taps + tap] = sum;
  }
}
