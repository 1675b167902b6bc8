// Step 2: all windows copied into one matrix, so that a convolution is a matrix product (linear/linear.cu).
//
// The product reuses what it loads 16 times, which step 1 does not at all. The price is the matrix: R*S times the input is
// written and read again, and has to fit into memory. Backward, the product comes first and its windows are added up.
#include "types.cuh"
#include "conv.cuh"

// columns[(n, p, q), (c, r, s)]: the window of x that y[n, p, q] sees; 0 outside the image
extern "C" __global__ void __launch_bounds__(256) im2col(const T* x, T* columns, Conv z) {
  const int taps = z.R * z.S, width = z.C * taps;
  const unsigned size = (unsigned)z.N * z.P * z.Q * width;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int j = i % width, s = j % z.S, r = j / z.S % z.R, c = j / taps;
    const int pixel = i / width, q = pixel % z.Q, p = pixel / z.Q % z.P, n = pixel / z.Q / z.P;
    const int h = p * z.u + r * z.l - z.a, w = q * z.v + s * z.m - z.b;
    const bool in = h >= 0 && h < z.H && w >= 0 && w < z.W;
    columns[i] = in ? x[((size_t)(n * z.H + h) * z.W + w) * z.C + c] : narrow<T>(0);
  }
}

// dx[n, h, w, c]: the sum of what the windows that see it hold of it
extern "C" __global__ void __launch_bounds__(256) col2im(const T* columns, T* dx, Conv z) {
  const int taps = z.R * z.S, width = z.C * taps;
  const unsigned size = (unsigned)z.N * z.H * z.W * z.C;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int c = i % z.C, w = i / z.C % z.W, h = i / z.C / z.W % z.H, n = i / z.C / z.W / z.H;
    real sum = 0;
    for (int r = 0; r < z.R; r++) {
      const int pu = h + z.a - r * z.l, p = pu / z.u;
      if (pu < 0 || pu % z.u || p >= z.P) continue;
      for (int s = 0; s < z.S; s++) {
        const int qv = w + z.b - s * z.m, q = qv / z.v;
        if (qv < 0 || qv % z.v || q >= z.Q) continue;
        sum += wide(columns[((size_t)(n * z.P + p) * z.Q + q) * width + (c * z.R + r) * z.S + s]);
      }
    }
    dx[i] = narrow<T>(sum);
  }
}
