// The sum of 64 numbers by one block: halves are added in shared memory until 32 sums are left, then a warp adds
// those through its registers. `python -m minires.kernels.interpreter` steps through it.

extern "C" __global__ void block_sum(const float* __restrict__ x, float* __restrict__ total) {
  __shared__ float sums[64];
  const int t = threadIdx.x;
  sums[t] = x[t];
  __syncthreads();
  if (t < 32) {
    float sum = sums[t] + sums[t + 32];
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(0xffffffffu, sum, lanes);
    if (t == 0) *total = sum;
  }
}
