// Step 3: the matrix of step 2 is never made: a tile in shared memory is filled straight from x by index arithmetic.
//
// Memory traffic falls by R*S. What is left to pay is the arithmetic, several divisions for each number of a tile, and
// loads of single numbers; step 4 is about these. Groups are the third axis of the grid.
//
// Long sums of wgrad, over all N P Q pixels, are cut into slices (blockIdx.z) of their own blocks, since dw alone has too few
// results to keep a GPU busy; a second kernel adds the slices up in order, so that every run gives the same bits.
#include "types.cuh"
#include "conv.cuh"
#include "gemm.cuh"

// Where y[n, p, q] with pixel = (n P + p) Q + q looks for tap (r, s): the first channel there, or -1 outside the image.
__forceinline__ long long seen(const Conv& z, int pixel, int r, int s) {
  const int q = pixel % z.Q, p = pixel / z.Q % z.P, n = pixel / z.Q / z.P;
  const int h = p * z.u + r * z.l - z.a, w = q * z.v + s * z.m - z.b;
  return h < 0 || h >= z.H || w < 0 || w >= z.W ? -1 : ((long long)(n * z.H + h) * z.W + w) * z.C;
}

// y[(n, p, q), k] = sum over j = (r, s, c) of x's window [(n, p, q), j] * w[k, j]; w lies as (K, R, S, Cg)
extern "C" __global__ void __launch_bounds__(256) fprop_implicit(const T* x, const T* w, T* y, Conv z) {
  const int k0 = blockIdx.z * z.Kg, c0 = blockIdx.z * z.Cg, depth = z.R * z.S * z.Cg;
  gemm_tile(
      z.N * z.P * z.Q, z.Kg, depth, blockIdx.x * TILE, blockIdx.y * TILE,
      [=](int m, int j) {
        const int tap = j / z.Cg;
        const long long at = seen(z, m, tap / z.S, tap % z.S);
        return at < 0 ? real(0) : wide(x[at + c0 + j % z.Cg]);
      },
      [=](int k, int j) { return wide(w[(size_t)(k0 + k) * depth + j]); },
      [=](int m, int k, real v) { y[(size_t)m * z.K + k0 + k] = narrow<T>(v); });
}

// dx[(n, h, w), c] = sum over j = (r, s, k) of dy[n, p, q, k] * w[k, r, s, c] where p*u + r*l - a = h, q*v + s*m - b = w
extern "C" __global__ void __launch_bounds__(256) dgrad_implicit(const T* dy, const T* w, T* dx, Conv z) {
  const int k0 = blockIdx.z * z.Kg, c0 = blockIdx.z * z.Cg, taps = z.R * z.S;
  gemm_tile(
      z.N * z.H * z.W, z.Cg, taps * z.Kg, blockIdx.x * TILE, blockIdx.y * TILE,
      [=](int m, int j) {
        const int at = m % z.W, h = m / z.W % z.H, n = m / z.W / z.H, tap = j / z.Kg;
        const int pu = h + z.a - tap / z.S * z.l, qv = at + z.b - tap % z.S * z.m, p = pu / z.u, q = qv / z.v;
        const bool hit = pu >= 0 && qv >= 0 && pu % z.u == 0 && qv % z.v == 0 && p < z.P && q < z.Q;
        return hit ? wide(dy[((size_t)(n * z.P + p) * z.Q + q) * z.K + k0 + j % z.Kg]) : real(0);
      },
      [=](int c, int j) { return wide(w[((size_t)(k0 + j % z.Kg) * taps + j / z.Kg) * z.Cg + c]); },
      [=](int m, int c, real v) { dx[(size_t)m * z.C + c0 + c] = narrow<T>(v); });
}

// parts[slice, k, j = (r, s, c)] = sum over the slice's pixels (n, p, q) of dy[n, p, q, k] * x's window [(n, p, q), j]
extern "C" __global__ void __launch_bounds__(256)
    wgrad_implicit(const T* x, const T* dy, real* parts, Conv z, int slices, int pixels) {
  const int group = blockIdx.z / slices, slice = blockIdx.z % slices, width = z.R * z.S * z.Cg;
  const int k0 = group * z.Kg, c0 = group * z.Cg, first = slice * pixels;
  gemm_tile(
      z.Kg, width, min(pixels, z.N * z.P * z.Q - first), blockIdx.x * TILE, blockIdx.y * TILE,
      [=](int k, int m) { return wide(dy[(size_t)(first + m) * z.K + k0 + k]); },
      [=](int j, int m) {
        const int tap = j / z.Cg;
        const long long at = seen(z, first + m, tap / z.S, tap % z.S);
        return at < 0 ? real(0) : wide(x[at + c0 + j % z.Cg]);
      },
      [=](int k, int j, real v) { parts[((size_t)slice * z.K + k0 + k) * width + j] = v; });
}

// dw[k, c, r, s] = sum over slices of parts[slice, k, r, s, c]
extern "C" __global__ void __launch_bounds__(256) wgrad_sum(const real* parts, T* dw, Conv z, int slices) {
  const int taps = z.R * z.S, size = z.K * z.Cg * taps;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < size; i += gridDim.x * blockDim.x) {
    const int tap = i % taps, c = i / taps % z.Cg, k = i / taps / z.Cg;
    const real* part = parts + ((size_t)k * taps + tap) * z.Cg + c;
    real sum = 0;
    for (int slice = 0; slice < slices; slice++) sum += part[(size_t)slice * size];
    dw[i] = narrow<T>(sum);
  }
}
