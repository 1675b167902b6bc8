// A batch of images from a data set of bytes in memory: a thread per number of the result, neighbours in channels, then in
// columns. The product is rounded before the sum, as on the CPU: the batch is the same there, to the bit.
#include "types.cuh"

struct Batch {
  int N, H, W, C, padding;
};

struct Place {
  int row, column, mirrored, top, left, bottom, right;
};

extern "C" __global__ void __launch_bounds__(256)
    augment(const unsigned char* images, const long long* rows, const Place* places, const float* scale,
            const float* shift, const float* border, T* y, Batch z) {
  const unsigned size = (unsigned)z.N * z.H * z.W * z.C;
  for (unsigned at = blockIdx.x * blockDim.x + threadIdx.x; at < size; at += gridDim.x * blockDim.x) {
    const int c = at % z.C, j = at / z.C % z.W, i = at / z.C / z.W % z.H, n = at / z.C / z.W / z.H;
    const Place p = places[n];
    const int u = i + p.row - z.padding, v = (p.mirrored ? z.W - 1 - j : j) + p.column - z.padding;
    float value = border[c];
    if (i >= p.top && i < p.bottom && j >= p.left && j < p.right) {
      value = 0;
    } else if (u >= 0 && u < z.H && v >= 0 && v < z.W) {
      const int pixel = (u * z.W + v) * z.C + c;
      const float byte = images[(size_t)rows[n] * z.H * z.W * z.C + pixel];
      value = __fadd_rn(__fmul_rn(byte, scale[c]), shift[pixel]);
    }
    y[at] = narrow<T>(value);
  }
}
