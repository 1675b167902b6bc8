// Step 1: a thread per result, straight from the definition.
//
// Any stride, padding, dilation and groups. Nothing is reused on purpose: every product waits for two loads, which the caches
// have to serve, and weights (K, C/groups, R, S) are read in strides. It is the kernel to read first, the one to check others
// against, and what serves grouped convolutions, where a tile has nothing to share.
#include "types.cuh"
#include "conv.cuh"
#include "warp.cuh"

// y[n, p, q, k] = sum over r, s, c of x[n, p*u + r*l - a, q*v + s*m - b, c] * w[k, c, r, s]
extern "C" __global__ void __launch_bounds__(256) fprop_direct(const T* x, const T* w, T* y, Conv z) {
  const unsigned size = (unsigned)z.N * z.P * z.Q * z.K;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int k = i % z.K, q = i / z.K % z.Q, p = i / z.K / z.Q % z.P, n = i / z.K / z.Q / z.P;
    const int taps = z.R * z.S, c0 = k / z.Kg * z.Cg;
    const T* filter = w + (size_t)k * z.Cg * taps;
    real sum = 0;
    for (int r = 0; r < z.R; r++) {
      const int h = p * z.u + r * z.l - z.a;
      if (h < 0 || h >= z.H) continue;
      for (int s = 0; s < z.S; s++) {
        const int at = q * z.v + s * z.m - z.b;
        if (at < 0 || at >= z.W) continue;
        const T* pixel = x + ((size_t)(n * z.H + h) * z.W + at) * z.C + c0;
        const T* tap = filter + r * z.S + s;
        for (int c = 0; c < z.Cg; c++) sum += wide(pixel[c]) * wide(tap[c * taps]);
      }
    }
    y[i] = narrow<T>(sum);
  }
}

// dx[n, h, w, c] = sum over r, s, k of dy[n, p, q, k] * w[k, c, r, s] where p*u + r*l - a = h, q*v + s*m - b = w
extern "C" __global__ void __launch_bounds__(256) dgrad_direct(const T* dy, const T* w, T* dx, Conv z) {
  const unsigned size = (unsigned)z.N * z.H * z.W * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, at = i / z.C % z.W, h = i / z.C / z.W % z.H, n = i / z.C / z.W / z.H;
    const int taps = z.R * z.S, filter = z.Cg * taps, k0 = c / z.Cg * z.Kg;
    real sum = 0;
    for (int r = 0; r < z.R; r++) {
      const int pu = h + z.a - r * z.l, p = pu / z.u;
      if (pu < 0 || pu % z.u || p >= z.P) continue;
      for (int s = 0; s < z.S; s++) {
        const int qv = at + z.b - s * z.m, q = qv / z.v;
        if (qv < 0 || qv % z.v || q >= z.Q) continue;
        const T* pixel = dy + ((size_t)(n * z.P + p) * z.Q + q) * z.K + k0;
        const T* tap = w + (size_t)k0 * filter + c % z.Cg * taps + r * z.S + s;
        for (int k = 0; k < z.Kg; k++) sum += wide(pixel[k]) * wide(tap[(size_t)k * filter]);
      }
    }
    dx[i] = narrow<T>(sum);
  }
}

// dw[k, c, r, s] = sum over n, p, q of dy[n, p, q, k] * x[n, p*u + r*l - a, q*v + s*m - b, c]
// A warp per weight; its lanes take every 32nd (n, p, q) and are summed in a fixed order.
extern "C" __global__ void __launch_bounds__(128) wgrad_direct(const T* x, const T* dy, T* dw, Conv z) {
  const int i = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (i >= z.K * z.Cg * z.R * z.S) return;  // a whole warp
  const int s = i % z.S, r = i / z.S % z.R, k = i / z.S / z.R / z.Cg;
  const int c = k / z.Kg * z.Cg + i / z.S / z.R % z.Cg;
  real sum = 0;
  for (int j = lane; j < z.N * z.P * z.Q; j += 32) {
    const int q = j % z.Q, p = j / z.Q % z.P, n = j / z.Q / z.P;
    const int h = p * z.u + r * z.l - z.a, at = q * z.v + s * z.m - z.b;
    if (h < 0 || h >= z.H || at < 0 || at >= z.W) continue;
    sum += wide(dy[(size_t)j * z.K + k]) * wide(x[((size_t)(n * z.H + h) * z.W + at) * z.C + c]);
  }
  sum = warp_sum(sum);
  if (lane == 0) dw[i] = narrow<T>(sum);
}
