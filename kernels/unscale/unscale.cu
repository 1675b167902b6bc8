// Gradients times the inverse of the loss scale, in place, for a group of tensors; found = 1 where one was not finite. Several
// blocks may find one, hence the atomic exchange.
#include "tensors.cuh"

__forceinline__ void set_one(float* found) { atomicExch((int*)found, 0x3f800000); }
__forceinline__ void set_one(double* found) { atomicExch((unsigned long long*)found, 0x3ff0000000000000ull); }

extern "C" __global__ void __launch_bounds__(256)
    unscale(const __grid_constant__ Tensors<1> tensors, const __grid_constant__ Chunks z, const real* inverse_scale,
            real* found) {
  const real factor = *inverse_scale;
  bool bad = false;
  each(z, [&](int t, int i) {
    T* g = tensors.at[0][t];
    const real v = g[i];
    bad |= !(v - v == 0);  // infinity less infinity is NaN, too
    g[i] = v * factor;
  });
  if (bad) set_one(found);
}
