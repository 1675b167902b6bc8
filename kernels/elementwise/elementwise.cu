// Elementwise kernels over n numbers of flat memory, 16 bytes per thread and turn where the arrays are aligned to that.
// All of them wait for memory, so the only question is how few and how wide the accesses are.
#include "types.cuh"

template <class F> __forceinline__ void each(const T* a, const T* b, T* y, unsigned n, F f) {
  constexpr unsigned V = 16 / sizeof(T);
  struct alignas(16) Pack { T v[V]; };
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const bool aligned = (((size_t)a | (size_t)b | (size_t)y) & 15) == 0;
  const unsigned packs = aligned ? n / V : 0;
  for (unsigned i = first; i < packs; i += step) {
    const Pack u = ((const Pack*)a)[i], v = ((const Pack*)b)[i];
    Pack w;
#pragma unroll
    for (unsigned j = 0; j < V; j++) w.v[j] = f(u.v[j], v.v[j]);
    ((Pack*)y)[i] = w;
  }
  for (unsigned i = packs * V + first; i < n; i += step) y[i] = f(a[i], b[i]);
}

// y = max(x, 0), and NaN where x is NaN
extern "C" __global__ void __launch_bounds__(256) relu_fprop(const T* x, T* y, unsigned n) {
  each(x, x, y, n, [](T u, T) { return wide(u) <= 0 ? narrow<T>(0) : u; });
}

// dx = dy where y > 0, else 0
extern "C" __global__ void __launch_bounds__(256) relu_bwd(const T* dy, const T* y, T* dx, unsigned n) {
  each(dy, y, dx, n, [](T u, T v) { return wide(v) > 0 ? u : narrow<T>(0); });
}

extern "C" __global__ void __launch_bounds__(256) add_fprop(const T* a, const T* b, T* y, unsigned n) {
  each(a, b, y, n, [](T u, T v) { return narrow<T>(wide(u) + wide(v)); });
}

// From float to T of 16 bits and back, a thread eight numbers at a time: 16 bytes of the narrower side.
template <class From, class To, class F> __forceinline__ void convert(const From* x, To* y, unsigned n, F f) {
  constexpr unsigned V = 8;
  struct alignas(16) In { From v[V]; };
  struct alignas(16) Out { To v[V]; };
  const unsigned first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const unsigned packs = (((size_t)x | (size_t)y) & 15) == 0 ? n / V : 0;
  for (unsigned i = first; i < packs; i += step) {
    const In u = ((const In*)x)[i];
    Out w;
#pragma unroll
    for (unsigned j = 0; j < V; j++) w.v[j] = f(u.v[j]);
    ((Out*)y)[i] = w;
  }
  for (unsigned i = packs * V + first; i < n; i += step) y[i] = f(x[i]);
}

extern "C" __global__ void __launch_bounds__(256) narrowed(const real* x, T* y, unsigned n) {
  convert(x, y, n, [](real u) { return narrow<T>(u); });
}

extern "C" __global__ void __launch_bounds__(256) widened(const T* x, real* y, unsigned n) {
  convert(x, y, n, [](T u) { return wide(u); });
}
