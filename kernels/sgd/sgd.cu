// One step of gradient descent with momentum over n numbers of flat memory: each is read and written once. The learning
// rate is a number of the launch, or lies in memory (has_lr), so that a captured launch can have another one each time.
#include "types.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sgd_step(T* p, const T* g, T* buf, const float* lr_there, unsigned n, real lr, real momentum, real keep, real decay,
             int has_lr, int has_buf, int nesterov, int first) {
  if (has_lr) lr = *lr_there;
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const real old = wide(p[i]);
    real d = wide(g[i]) + decay * old;
    if (has_buf) {
      const real b = first ? d : momentum * wide(buf[i]) + keep * d;
      buf[i] = narrow<T>(b);
      d = nesterov ? d + momentum * b : b;
    }
    p[i] = narrow<T>(old - lr * d);
  }
}
