// One step of AdamW or Adam for a group of tensors: every number is read and written once. What changes from step to step lies
// in memory, so that a captured launch can have other values each time; where `found` is not 0, nothing changes.
#include "tensors.cuh"

extern "C" __global__ void __launch_bounds__(256)
    adamw_step(const __grid_constant__ Tensors<5> tensors, const __grid_constant__ Chunks z, const real* factors,
               const real* found, real keep1, real beta2, real keep2, real eps, real penalty, int has_found,
               int amsgrad) {
  if (has_found && *found != 0) return;
  const real shrink = factors[0], correction = factors[1], rate = factors[2];
  each(z, [&](int t, int i) {
    T *p = tensors.at[0][t], *m = tensors.at[2][t], *v = tensors.at[3][t], *most = tensors.at[4][t];
    const real old = p[i], g = tensors.at[1][t][i] + penalty * old;
    const real mean = m[i] + keep1 * (g - m[i]), square = beta2 * v[i] + keep2 * g * g;
    m[i] = mean, v[i] = square;
    real largest = square;
    if (amsgrad) most[i] = largest = most[i] > square ? most[i] : square;
    p[i] = shrink * old - rate * mean / (sqrt(largest) / correction + eps);
  });
}
