// Where the numbers of a tile come from, for convolutions as matrix products by tiles of BM rows x BN columns, BK deep, by
// THREADS threads. The file that includes this defines these four, and `number`, the type of an element; channels and filters
// are multiples of V, of which 16 bytes hold V.
//
//             rows                    columns             sum over
//     fprop   pixels (n, p, q) of y   filters k           j = (r, s, c)
//     dgrad   pixels (n, h, w) of dx  channels c          j = (tap, k)
//     wgrad   weights j = (r, s, c)   filters k           pixels (n, p, q) of y
//
// A loader gives thread t the addresses of its LOADS pieces of 16 bytes of a tile, row(i) and depth(i) of which it says:
// at(i) is null where the tile has zeros (padding, tails), next() goes on to the next tile; channel() is that of the first number
// of its pieces (of all but weights, whose pieces nobody changes). There are no divisions after the constructor: a thread knows its pixel, and
// steps from tap to tap by additions.
#include "conv.cuh"

constexpr int V = 16 / sizeof(number);

// Pieces run along the sum.
template <int WIDTH> struct AlongSum {
  static constexpr int SIZE = WIDTH * BK;  // of a tile, in numbers
  static constexpr int PIECES = BK / V, LOADS = (WIDTH * PIECES + THREADS - 1) / THREADS;
  __forceinline__ static bool active() { return WIDTH * PIECES >= THREADS || threadIdx.x < WIDTH * PIECES; }
  __forceinline__ static int row(int i) { return threadIdx.x / PIECES + i * (THREADS / PIECES); }
  __forceinline__ static int depth(int) { return threadIdx.x % PIECES * V; }
};

// Pieces run along the rows (or columns) of the tile.
template <int WIDTH> struct AlongRows {
  static constexpr int SIZE = WIDTH * BK;
  static constexpr int PIECES = WIDTH / V, LOADS = (BK * PIECES + THREADS - 1) / THREADS;
  __forceinline__ static bool active() { return BK * PIECES >= THREADS || threadIdx.x < BK * PIECES; }
  __forceinline__ static int row(int) { return threadIdx.x % PIECES * V; }
  __forceinline__ static int depth(int i) { return threadIdx.x / PIECES + i * (THREADS / PIECES); }
};

// fprop's rows: pixels (n, p, q) of y; depths j = (r, s, c) of the window of x.
struct Windows : AlongSum<BM> {
  const number* x;
  const Conv& z;
  int h0[LOADS], w0[LOADS], image[LOADS], r, s, c;
  __forceinline__ Windows(const number* x, const Conv& z, int m0) : x(x), z(z) {
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
  __forceinline__ const number* at(int i) {
    const int h = h0[i] + r * z.l, w = w0[i] + s * z.m;
    const bool in = h >= 0 && h < z.H && w >= 0 && w < z.W && r < z.R;
    return in ? x + ((image[i] + h) * z.W + w) * z.C + c : nullptr;
  }
  __forceinline__ int channel() const { return c; }
  __forceinline__ void next() { c += BK, settle(); }
};

// fprop's columns: filters; depths j = (r, s, c), as weights (K, R, S, C) lie.
struct Filters : AlongSum<BN> {
  const number* w;
  int n0, filters, j, size;
  __forceinline__ Filters(const number* w, const Conv& z, int n0)
      : w(w), n0(n0), filters(z.K), j(depth(0)), size(z.R * z.S * z.C) {}
  __forceinline__ const number* at(int i) {
    const int k = n0 + row(i);
    return k < filters && j < size ? w + k * size + j : nullptr;
  }
  __forceinline__ void next() { j += BK; }
};

// Of a class of pixels: the taps that meet it, and where in dy relative to (h / u, w / v).
struct Taps {
  int count, tap[256], dp[256], dq[256];
  __forceinline__ void find(const Conv& z, int h0, int w0) {
    count = 0;
    for (int t = 0; t < z.R * z.S; t++) {
      const int pu = h0 + z.a - t / z.S * z.l, qv = w0 + z.b - t % z.S * z.m;
      if (pu % z.u || qv % z.v) continue;
      tap[count] = t, dp[count] = pu / z.u, dq[count++] = qv / z.v;
    }
  }
};

// dgrad's rows: the class's pixels (n, h, w) of dx; depths j = (tap, k) of dy.
struct Upstream : AlongSum<BM> {
  const number* dy;
  const Conv& z;
  const Taps& taps;
  int h[LOADS], w[LOADS], image[LOADS], t, k;
  __forceinline__ Upstream(const number* dy, const Conv& z, const Taps& taps, int m0, int rows, int columns)
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
  __forceinline__ const number* at(int i) {
    if (t >= taps.count || image[i] >= z.N) return nullptr;
    const int p = h[i] + taps.dp[t], q = w[i] + taps.dq[t];
    const bool in = p >= 0 && p < z.P && q >= 0 && q < z.Q;
    return in ? dy + ((image[i] * z.P + p) * z.Q + q) * z.K + k : nullptr;
  }
  __forceinline__ int channel() const { return k; }
  __forceinline__ void next() { k += BK, settle(); }
};

// dgrad's columns: channels, neighbours in memory; depths j = (tap, k).
struct FiltersAcross : AlongRows<BN> {
  const number* w;
  const Conv& z;
  const Taps& taps;
  int c, t[LOADS], k[LOADS];
  __forceinline__ FiltersAcross(const number* w, const Conv& z, const Taps& taps, int n0)
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
  __forceinline__ const number* at(int i) {
    const bool in = c < z.C && t[i] < taps.count;
    return in ? w + (k[i] * z.R * z.S + taps.tap[t[i]]) * z.C + c : nullptr;
  }
  __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < LOADS; i++) k[i] += BK;
    settle();
  }
};

// wgrad's rows: weights j = (r, s, c), neighbours in memory of x; depths: pixels (n, p, q) of y.
struct WindowsAcross : AlongRows<BM> {
  const number* x;
  const Conv& z;
  int h0, w0, c, pixel[LOADS], p[LOADS], q[LOADS], image[LOADS], last;
  __forceinline__ WindowsAcross(const number* x, const Conv& z, int m0, int first, int last) : x(x), z(z), last(last) {
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
  __forceinline__ const number* at(int i) {
    const int h = p[i] * z.u + h0, w = q[i] * z.v + w0;
    const bool in = pixel[i] < last && h >= 0 && h < z.H && w >= 0 && w < z.W;
    return in ? x + ((image[i] * z.H + h) * z.W + w) * z.C + c : nullptr;
  }
  __forceinline__ int channel() const { return c; }
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
  const number* dy;
  int filters, channel0, pixel[LOADS], last;
  __forceinline__ UpstreamAcross(const number* dy, const Conv& z, int n0, int first, int last)
      : dy(dy + n0 + row(0)), filters(z.K), channel0(n0 + row(0)), last(n0 + row(0) < z.K ? last : 0) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) pixel[i] = first + depth(i);
  }
  __forceinline__ const number* at(int i) {
    return pixel[i] < last ? dy + pixel[i] * filters : nullptr;
  }
  __forceinline__ int channel() const { return channel0; }
  __forceinline__ void next() {
#pragma unroll
    for (int i = 0; i < LOADS; i++) pixel[i] += BK;
  }
};

// The slices of wgrad's sums, added up: write(i, sum) for each weight i = (k, c, r, s) with a c that is no padding. Of 256 threads
// `sharers` have one weight: each adds up every sharers-th slice, then one adds up theirs, in order. A long chain of loads and
// additions would take longer than the product itself where weights are few.
template <class F> __forceinline__ void wgrad_sum(const float* parts, int slices, int sharers, const Conv& z, F write) {
  __shared__ float shares[256];
  const int weights = 256 / sharers, share = threadIdx.x / weights, i = blockIdx.x * weights + threadIdx.x % weights;
  const int taps = z.R * z.S, size = z.K * z.Cg * taps;
  const int k = i % z.K, tap = i / z.K % taps, c = i / z.K / taps;  // neighbouring threads read neighbours
  float sum = 0;
  if (i < size) {
    const float* part = parts + (size_t)(tap * z.C + c) * z.K + k;
#pragma unroll 8
    for (int slice = share; slice < slices; slice += sharers) sum += part[(size_t)slice * taps * z.C * z.K];
  }
  if (sharers > 1) {
    shares[threadIdx.x] = sum;
    __syncthreads();
    if (share) return;
    for (int other = threadIdx.x + weights; other < 256; other += weights) sum += shares[other];
  }
  if (i < size) write((k * z.Cg + c) * taps + tap, sum);
}
