// Which elements dropout keeps: Philox4x64-10 (problem.py has the formula), a block of 8 numbers per thread.
using word = unsigned long long;

extern "C" __global__ void __launch_bounds__(256)
    dropout_mask(const word* key, signed char* mask, int n, unsigned threshold) {
  const unsigned block = blockIdx.x * blockDim.x + threadIdx.x;
  if (block >= (n + 7u) / 8) return;
  word c[4] = {block + 1ull, 0, 0, 0}, k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const word a = 0xD2E7470EE14C6C93 * c[0], a_high = __umul64hi(0xD2E7470EE14C6C93, c[0]);
    const word b = 0xCA5A826395121157 * c[2], b_high = __umul64hi(0xCA5A826395121157, c[2]);
    c[0] = b_high ^ c[1] ^ k0, c[1] = b;
    c[2] = a_high ^ c[3] ^ k1, c[3] = a;
    k0 += 0x9E3779B97F4A7C15, k1 += 0xBB67AE8584CAA73B;
  }
  for (int i = 0; i < 8; ++i) {
    const unsigned at = 8 * block + i, half = (unsigned)(c[i / 2] >> 32 * (i % 2));
    if (at < n) mask[at] = half >> 8 >= threshold;
  }
}
