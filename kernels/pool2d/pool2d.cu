// Pooling in channels-last memory: a thread per result, neighbouring threads in neighbouring channels, so that every access
// of a warp is one run of memory. Letters as in kernels/README.md; window (R, S), stride (u, v), padding (a, b), dilation
// (l, m).
#include "types.cuh"

struct Window {
  int N, H, W, C, P, Q, R, S, u, v, a, b, l, m;
};

// Taps [first, last) of a window that starts at pixel `start` of an axis lie inside the image.
__forceinline__ void inside(int start, int taps, int dilation, int size, int* first, int* last) {
  *first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const int room = size - start;  // pixels from the first tap to the end of the image
  *last = room <= 0 ? 0 : min(taps, (room + dilation - 1) / dilation);
}

// The greatest of each window and its index h*W + w: the first that is so great, or the last NaN; -inf and -1 for none.
extern "C" __global__ void __launch_bounds__(256) maxpool_fprop(const T* x, T* y, int* indices, Window z) {
  const unsigned size = (unsigned)z.N * z.P * z.Q * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, q = i / z.C % z.Q, p = i / z.C / z.Q % z.P, n = i / z.C / z.Q / z.P;
    const int h0 = p * z.u - z.a, w0 = q * z.v - z.b;
    const T* image = x + (size_t)n * z.H * z.W * z.C + c;
    int r0, r1, s0, s1, best = -1;
    inside(h0, z.R, z.l, z.H, &r0, &r1);
    inside(w0, z.S, z.m, z.W, &s0, &s1);
    real most = -__int_as_float(0x7f800000);
    for (int r = r0; r < r1; r++)
      for (int s = s0; s < s1; s++) {
        const int at = (h0 + r * z.l) * z.W + w0 + s * z.m;
        const real v = wide(image[(size_t)at * z.C]);
        if (v > most || v != v || best < 0) most = v, best = at;  // nothing is > NaN: only another one replaces it
      }
    y[i] = narrow<T>(most);
    indices[i] = best;
  }
}

// Windows [first, last] of an axis that may see pixel h: window p spans p * stride - padding and `extent` pixels from there.
__forceinline__ void windows(int h, int stride, int padding, int extent, int count, int* first, int* last) {
  const int end = h + padding;
  *first = end < extent ? 0 : (end - extent) / stride + 1;
  *last = min(end / stride, count - 1);
}

// dx: each dy goes to the pixel that was the greatest. A thread per pixel gathers from the windows that see it, in order, so
// that the sums are the same on every run.
extern "C" __global__ void __launch_bounds__(256) maxpool_bwd(const T* dy, const int* indices, T* dx, Window z) {
  const unsigned size = (unsigned)z.N * z.H * z.W * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, w = i / z.C % z.W, h = i / z.C / z.W % z.H, n = i / z.C / z.W / z.H, here = h * z.W + w;
    const size_t image = (size_t)n * z.P * z.Q * z.C + c;
    int p0, p1, q0, q1;
    windows(h, z.u, z.a, (z.R - 1) * z.l + 1, z.P, &p0, &p1);
    windows(w, z.v, z.b, (z.S - 1) * z.m + 1, z.Q, &q0, &q1);
    real sum = 0;
    for (int p = p0; p <= p1; p++)
      for (int q = q0; q <= q1; q++) {
        const size_t at = image + (size_t)(p * z.Q + q) * z.C;
        if (indices[at] == here) sum += wide(dy[at]);
      }
    dx[i] = narrow<T>(sum);
  }
}

// How many taps of a window along one axis count for the average.
__forceinline__ int counted(int start, int taps, int size, int padding, int with_padding) {
  return with_padding ? min(start + taps, size + padding) - start : min(start + taps, size) - max(start, 0);
}

__forceinline__ real divisor(const Window& z, int p, int q, int with_padding) {
  const int h = counted(p * z.u - z.a, z.R, z.H, z.a, with_padding);
  const int w = counted(q * z.v - z.b, z.S, z.W, z.b, with_padding);
  return real(h > 0 && w > 0 ? h * w : 1);
}

extern "C" __global__ void __launch_bounds__(256) avgpool_fprop(const T* x, T* y, Window z, int with_padding) {
  const unsigned size = (unsigned)z.N * z.P * z.Q * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, q = i / z.C % z.Q, p = i / z.C / z.Q % z.P, n = i / z.C / z.Q / z.P;
    const int h0 = p * z.u - z.a, w0 = q * z.v - z.b;
    const T* image = x + (size_t)n * z.H * z.W * z.C + c;
    real sum = 0;
    for (int h = max(h0, 0); h < min(h0 + z.R, z.H); h++)
      for (int w = max(w0, 0); w < min(w0 + z.S, z.W); w++) sum += wide(image[(size_t)(h * z.W + w) * z.C]);
    y[i] = narrow<T>(sum / divisor(z, p, q, with_padding));
  }
}

// dx: a thread per pixel gathers from the windows that see it.
extern "C" __global__ void __launch_bounds__(256) avgpool_bwd(const T* dy, T* dx, Window z, int with_padding) {
  const unsigned size = (unsigned)z.N * z.H * z.W * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, w = i / z.C % z.W, h = i / z.C / z.W % z.H, n = i / z.C / z.W / z.H;
    const T* image = dy + (size_t)n * z.P * z.Q * z.C + c;
    int p0, p1, q0, q1;
    windows(h, z.u, z.a, z.R, z.P, &p0, &p1);
    windows(w, z.v, z.b, z.S, z.Q, &q0, &q1);
    real sum = 0;
#pragma unroll 1  // NVRTC 12.9 runs out of registers on sm_120 otherwise
    for (int p = p0; p <= p1; p++)
#pragma unroll 1
      for (int q = q0; q <= q1; q++)
        sum += wide(image[(size_t)(p * z.Q + q) * z.C]) / divisor(z, p, q, with_padding);
    dx[i] = narrow<T>(sum);
  }
}
