// Batch normalisation over channels-last memory: M = N H W rows of C numbers. A block of (X, Y) threads takes X channels,
// threadIdx.x, and every Y-th row of its stretch, threadIdx.y: a warp's accesses are one run of memory.
//
// Sums over rows are formed in three stages whose order depends on the shape alone, so that every run gives the same bits:
// each thread over its rows, the block over its threads (shared memory), one thread per channel over the blocks.
// Variances are never E[x^2] - E[x]^2, which cancels; means and sums of squared distances (M2) of parts are merged:
//
//     n = na + nb    d = mean_b - mean_a    mean = mean_a + d nb/n    M2 = M2_a + M2_b + d^2 na nb/n
//
// Source: Chan, Golub & LeVeque 1983, equations 2.1.
//
// Activations are in T, of 16 bits perhaps; all that there is one of per channel is in what is computed with, `real`.
#include "types.cuh"

constexpr int THREADS = 256, AT_ONCE = 8;  // rows that a thread has in flight

struct Rows {
  int rows, channels, stretch;  // stretch: rows of a block
};

struct Moments {
  real n, mean, m2;
  __forceinline__ void merge(const Moments& b) {
    if (b.n == 0) return;
    const real total = n + b.n, d = b.mean - mean, share = b.n / total;
    mean += d * share;
    m2 += b.m2 + d * d * n * share;
    n = total;
  }
};

// Mean and M2 of every channel over each block's rows: partial (blocks, 2, C).
extern "C" __global__ void __launch_bounds__(THREADS) bn_statistics(const T* x, real* partial, Rows z) {
  __shared__ real means[THREADS], m2s[THREADS], counts[THREADS];
  const int c = blockIdx.y * blockDim.x + threadIdx.x, tid = threadIdx.y * blockDim.x + threadIdx.x;
  const int first = blockIdx.x * z.stretch, last = min(first + z.stretch, z.rows);
  Moments all = {0, 0, 0};
  if (c < z.channels)
    for (int row = first + threadIdx.y; row < last; row += AT_ONCE * blockDim.y) {
      real v[AT_ONCE], sum = 0;
      int n = 0;
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++) {
        const int at = row + i * blockDim.y;
        v[i] = at < last ? wide(x[(size_t)at * z.channels + c]) : real(0);
        sum += v[i];
        n += at < last;
      }
      Moments part = {real(n), sum / n, 0};
#pragma unroll
      for (int i = 0; i < AT_ONCE; i++)
        if (i < n) part.m2 += (v[i] - part.mean) * (v[i] - part.mean);
      all.merge(part);
    }
  counts[tid] = all.n, means[tid] = all.mean, m2s[tid] = all.m2;
  __syncthreads();
  for (int half = blockDim.y / 2; half; half /= 2) {
    if (threadIdx.y < half) {
      const int other = tid + half * blockDim.x;
      all.merge({counts[other], means[other], m2s[other]});
      counts[tid] = all.n, means[tid] = all.mean, m2s[tid] = all.m2;
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && c < z.channels) {
    partial[(size_t)(2 * blockIdx.x) * z.channels + c] = all.mean;
    partial[(size_t)(2 * blockIdx.x + 1) * z.channels + c] = all.m2;
  }
}

// mean, biased variance and 1 / sqrt(var + eps) of every channel, from the blocks' moments.
extern "C" __global__ void __launch_bounds__(THREADS)
    bn_finish(const real* partial, real* mean, real* var, real* inv_std, int parts, real eps, Rows z) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= z.channels) return;
  Moments all = {0, 0, 0};
  for (int b = 0; b < parts; b++)
    all.merge({real(min(z.stretch, z.rows - b * z.stretch)), partial[(size_t)(2 * b) * z.channels + c],
               partial[(size_t)(2 * b + 1) * z.channels + c]});
  const real v = all.m2 / max(z.rows, 1);
  mean[c] = all.mean;
  var[c] = v;
  inv_std[c] = 1 / sqrt(v + eps);
}

// What is normalised, of one channel: (x - shift) * scale + offset.
struct Channel {
  real shift, scale, offset;
  __forceinline__ Channel(const real* gamma, const real* beta, const real* mean, const real* inv_std, int c)
      : shift(mean[c]), scale(gamma[c] * inv_std[c]), offset(beta[c]) {}
  __forceinline__ real operator()(T x) const { return (wide(x) - shift) * scale + offset; }
};

// y = act((x - mean) * gamma * inv_std + beta + z)
extern "C" __global__ void __launch_bounds__(THREADS)
    bn_normalise(const T* x, const real* gamma, const real* beta, const real* mean, const real* inv_std, const T* skip,
                 T* y, int add, int relu, Rows z) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= z.channels) return;
  const Channel normalised(gamma, beta, mean, inv_std, c);
  const int last = min((int)(blockIdx.x + 1) * z.stretch, z.rows);
#pragma unroll 4
  for (int row = blockIdx.x * z.stretch + threadIdx.y; row < last; row += blockDim.y) {
    const size_t at = (size_t)row * z.channels + c;
    real v = normalised(x[at]);
    if (add) v += wide(skip[at]);
    y[at] = narrow<T>(relu && v <= 0 ? real(0) : v);  // a NaN stays
  }
}

// Which dy count: all of them, those where y > 0, or, where y is not kept because x tells it, those where the normalised
// x is > 0.
enum Mask { ALL, BY_Y, BY_X };

__forceinline__ real masked(T dy, int mask, const T* y, T x, const Channel& normalised, size_t at) {
  const bool off = mask == BY_Y ? !(wide(y[at]) > 0) : mask == BY_X && !(normalised(x) > 0);
  return off ? real(0) : wide(dy);
}

// Sums of g and of g * (x - mean) of every channel over each block's rows: partial (blocks, 2, C). g = dy where the mask
// lets it through, else 0; written to dz where there is a residual.
extern "C" __global__ void __launch_bounds__(THREADS)
    bn_sums(const T* dy, const T* x, const T* y, const real* gamma, const real* beta, const real* mean,
            const real* inv_std, T* dz, real* partial, int mask, int residual, Rows z) {
  __shared__ real plain[THREADS], weighted[THREADS];
  const int c = blockIdx.y * blockDim.x + threadIdx.x, tid = threadIdx.y * blockDim.x + threadIdx.x;
  const int last = min((int)(blockIdx.x + 1) * z.stretch, z.rows);
  real sum = 0, product = 0;
  if (c < z.channels) {
    const Channel normalised(gamma, beta, mean, inv_std, c);
#pragma unroll 4
    for (int row = blockIdx.x * z.stretch + threadIdx.y; row < last; row += blockDim.y) {
      const size_t at = (size_t)row * z.channels + c;
      const T v = x[at];
      const real g = masked(dy[at], mask, y, v, normalised, at);
      if (residual) dz[at] = narrow<T>(g);
      sum += g;
      product += g * (wide(v) - normalised.shift);
    }
  }
  plain[tid] = sum, weighted[tid] = product;
  __syncthreads();
  for (int half = blockDim.y / 2; half; half /= 2) {
    if (threadIdx.y < half) {
      const int other = tid + half * blockDim.x;
      plain[tid] += plain[other], weighted[tid] += weighted[other];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && c < z.channels) {
    partial[(size_t)(2 * blockIdx.x) * z.channels + c] = plain[tid];
    partial[(size_t)(2 * blockIdx.x + 1) * z.channels + c] = weighted[tid];
  }
}

// dbeta = sum of g, dgamma = inv_std * sum of g * (x - mean), and the factors of dx below: factors (3, C).
extern "C" __global__ void __launch_bounds__(THREADS)
    bn_finish_bwd(const real* partial, const real* gamma, const real* inv_std, real* dgamma, real* dbeta,
                  real* factors, int parts, int training, Rows z) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= z.channels) return;
  real sum = 0, product = 0;
  for (int b = 0; b < parts; b++) {
    sum += partial[(size_t)(2 * b) * z.channels + c];
    product += partial[(size_t)(2 * b + 1) * z.channels + c];
  }
  const real s = inv_std[c], scale = gamma[c] * s, m = max(z.rows, 1);
  dbeta[c] = sum;
  dgamma[c] = product * s;
  factors[c] = scale;
  factors[z.channels + c] = training ? scale * sum / m : real(0);
  factors[2 * z.channels + c] = training ? scale * s * s * product / m : real(0);
}

// dx = scale * g - constant - slope * (x - mean); in evaluation constant and slope are 0.
extern "C" __global__ void __launch_bounds__(THREADS)
    bn_dx(const T* dy, const T* x, const T* y, const real* gamma, const real* beta, const real* mean,
          const real* inv_std, const real* factors, T* dx, int mask, int training, Rows z) {
  const int c = blockIdx.y * blockDim.x + threadIdx.x;
  if (c >= z.channels) return;
  const Channel normalised(gamma, beta, mean, inv_std, c);
  const real scale = factors[c], constant = factors[z.channels + c], slope = factors[2 * z.channels + c];
  const int last = min((int)(blockIdx.x + 1) * z.stretch, z.rows);
#pragma unroll 4
  for (int row = blockIdx.x * z.stretch + threadIdx.y; row < last; row += blockDim.y) {
    const size_t at = (size_t)row * z.channels + c;
    const T v = training || mask == BY_X ? x[at] : dy[at];
    real result = scale * masked(dy[at], mask, y, v, normalised, at);
    if (training) result -= constant + slope * (wide(v) - normalised.shift);
    dx[at] = narrow<T>(result);
  }
}
