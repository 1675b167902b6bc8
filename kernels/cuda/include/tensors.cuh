// Many tensors in one launch. Their addresses and sizes are arguments by value (4 KB of arguments is what every driver takes).
// A block takes CHUNK numbers of one tensor, and finds out of which.
#include "types.cuh"

constexpr int MOST = 80, CHUNK = 4096;  // as in kernels/cuda/groups.py

template <int ROLES> struct Tensors { T* at[ROLES][MOST]; };  // parameters, gradients, ...

struct Chunks {
  int tensors, size[MOST], first[MOST];  // first: the tensor's first block
};

// f(t, i) for every number i of the block's share of its tensor t.
template <class F> __forceinline__ void each(const Chunks& z, F f) {
  int t = 0, above = z.tensors;
  while (above - t > 1) {  // the last tensor that begins at this block or before
    const int middle = (t + above) / 2;
    if (z.first[middle] <= (int)blockIdx.x)
      t = middle;
    else
      above = middle;
  }
  const int begin = ((int)blockIdx.x - z.first[t]) * CHUNK, end = min(begin + CHUNK, z.size[t]);
#pragma unroll 2
  for (int i = begin + threadIdx.x; i < end; i += blockDim.x) f(t, i);
}
