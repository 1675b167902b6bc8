// y = act(y + b[k] + z) in place, over channels-last memory of K channels: what follows a convolution in inference.
#include "types.cuh"

extern "C" __global__ void __launch_bounds__(256)
    bias_act(T* y, const T* b, const T* z, unsigned n, unsigned channels, int add, int relu) {
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    real v = wide(y[i]) + wide(b[i % channels]);
    if (add) v += wide(z[i]);
    y[i] = narrow<T>(relu && v <= 0 ? real(0) : v);  // a NaN stays
  }
}
