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

// dx: each dy goes to the pixel that was the greatest. A thread has one channel of one image to itself, and goes through its
// windows in order: no two threads add to one pixel, so the sums are the same on every run.
extern "C" __global__ void __launch_bounds__(64)
    maxpool_bwd(const T* dy, const int* indices, T* dx, int images, int channels, int pixels, int windows) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= images * channels) return;
  const int n = i / channels, c = i % channels;
  T* image = dx + (size_t)n * pixels * channels + c;
  for (int at = 0; at < pixels; at++) image[(size_t)at * channels] = narrow<T>(0);
  const size_t first = (size_t)n * windows * channels + c;
  for (int j = 0; j < windows; j++) {
    const int at = indices[first + (size_t)j * channels];
    if (at < 0) continue;
    T* to = image + (size_t)at * channels;
    *to = narrow<T>(wide(*to) + wide(dy[first + (size_t)j * channels]));
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
    const int h1 = h + z.a, w1 = w + z.b;  // window p sees row h where p*u <= h1 < p*u + R
    const int p0 = h1 < z.R ? 0 : (h1 - z.R) / z.u + 1, q0 = w1 < z.S ? 0 : (w1 - z.S) / z.v + 1;
    real sum = 0;
    for (int p = p0; p <= min(h1 / z.u, z.P - 1); p++)
      for (int q = q0; q <= min(w1 / z.v, z.Q - 1); q++)
        sum += wide(image[(size_t)(p * z.Q + q) * z.C]) / divisor(z, p, q, with_padding);
    dx[i] = narrow<T>(sum);
  }
}
