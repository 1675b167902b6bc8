// One step of gradient descent with momentum for a group of tensors: every number is read and written once. The learning
// rate lies in memory, so that a captured launch can have another one each time; where `found` is not 0, nothing changes.
#include "tensors.cuh"

extern "C" __global__ void __launch_bounds__(256)
    sgd_step(const __grid_constant__ Tensors<3> tensors, const __grid_constant__ Chunks z, const real* rate,
             const real* found, real momentum, real keep, real decay, int has_found, int has_buf, int nesterov,
             int first) {
  if (has_found && *found != 0) return;
  const real lr = *rate;
  each(z, [&](int t, int i) {
    T *p = tensors.at[0][t], *buf = tensors.at[2][t];
    const real old = p[i];
    real d = tensors.at[1][t][i] + decay * old;
    if (has_buf) {
      const real b = first ? d : momentum * buf[i] + keep * d;
      buf[i] = b;
      d = nesterov ? d + momentum * b : b;
    }
    p[i] = old - lr * d;
  });
}
