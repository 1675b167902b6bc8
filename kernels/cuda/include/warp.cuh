// Reductions over the 32 lanes of a warp; every lane gets the result, and the order of additions is fixed.

// A NaN on either side is handed on only by warp_sum: maxima of rows with a NaN are of no use anyway.
template <class R> __forceinline__ R larger(R a, R b) { return a > b ? a : b; }

template <class R> __forceinline__ R warp_max(R v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v = larger(v, __shfl_xor_sync(0xffffffff, v, i));
  return v;
}

template <class R> __forceinline__ R warp_sum(R v) {
#pragma unroll
  for (int i = 16; i; i /= 2) v += __shfl_xor_sync(0xffffffff, v, i);
  return v;
}
