// Softmax cross-entropy of logits (N, K) and targets (N). Forward: a warp per row, whose lanes take every 32nd class, so
// that a row is read three times, from memory once and then from the cache. Backward: a thread per number.
#include "types.cuh"
#include "warp.cuh"

// log_probs[n, k] = x[n, k] - m - log(sum over j of exp(x[n, j] - m)), loss[n] = -log_probs[n, target[n]]
extern "C" __global__ void __launch_bounds__(128)
    ce_fprop(const T* logits, const long long* target, T* loss, T* log_probs, int rows, int classes) {
  const int row = blockIdx.x * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;  // a whole warp
  const T* x = logits + (size_t)row * classes;
  T* y = log_probs + (size_t)row * classes;
  real most = lane < classes ? wide(x[lane]) : wide(x[0]);
  for (int k = lane + 32; k < classes; k += 32) most = larger(most, wide(x[k]));
  most = warp_max(most);
  real total = 0;
  for (int k = lane; k < classes; k += 32) total += exp(wide(x[k]) - most);
  const real log_total = log(warp_sum(total));
  const int label = (int)target[row];
  for (int k = lane; k < classes; k += 32) {
    const real v = wide(x[k]) - most - log_total;
    y[k] = narrow<T>(v);
    if (k == label) loss[row] = narrow<T>(-v);
  }
}

// dlogits[n, k] = dloss[n] * (exp(log_probs[n, k]) - [k == target[n]])
extern "C" __global__ void __launch_bounds__(256)
    ce_bwd(const T* dloss, const T* log_probs, const long long* target, T* dlogits, unsigned n, unsigned classes) {
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    const unsigned row = i / classes;
    const real hit = target[row] == i % classes ? 1 : 0;
    dlogits[i] = narrow<T>(wide(dloss[row]) * (exp(wide(log_probs[i])) - hit));
  }
}
