// Step 7: Hopper's own instructions (sm_90a): tiles copied by TMA, products by wgmma, and warps that do only one of the two.
// It has not run on hardware yet, only in the interpreter, and is not the default: use_kernels(conv2d_fprop="fprop_wgmma").
//
// What changed from step 5, and why:
// - One thread copies whole tiles: it gives TMA a tensor map and coordinates, and no thread computes addresses any more, or
//   spends registers on them. A tile of 128 pixels is a box of the image, BW x BH x BI pixels of output, moved by the tap; what
//   lies outside the image arrives as zeros, which is the padding. At stride 2 the map itself takes every second pixel.
// - wgmma multiplies 64 x 16 by 16 x COLUMNS in one instruction of a warpgroup, both factors from shared memory: no ldmatrix, no
//   fragments. It runs on while the next one is prepared, one group behind.
// - Of three warpgroups one copies and two multiply. They meet at mbarriers, two per stage: `full`, on which the bytes of the
//   copies arrive, and `empty`, on which both multipliers say that they have read it. No __syncthreads in the loop; the
//   copying warpgroup hands its registers over (setmaxnreg).
//
// Where images do not divide into boxes (7 x 7) part of a tile is empty: TMA's im2col mode would not waste it. Not yet: results
// written by TMA, blocks that stay for several tiles, clusters that share tiles.
// dgrad at stride 1 is fprop of dy with the filters turned round and C and K exchanged: the launcher does that.
// Source: PTX ISA; the division of labour is that of cutlass's warp-specialised kernels for sm_90.
#include "types.cuh"
#include "mma.cuh"
#include "hopper.cuh"
#include "conv.cuh"

constexpr int BM = 128, BN = COLUMNS, DEPTH = 64, STAGES = 4, GROUP = 128;  // DEPTH numbers are 128 bytes, the swizzle's width
constexpr int A_BYTES = BM * 128, B_BYTES = BN * 128, STAGE = A_BYTES + B_BYTES;
extern __shared__ __align__(1024) unsigned char shared_memory[];

struct Box {
  int W, H, I;  // pixels of output along a row, rows, images: W H I = BM
};

// y[(n, p, q), k]; maps of x (C, W, H, N) and of w (C, R S, K)
extern "C" __global__ void __launch_bounds__(3 * GROUP, 1)
    fprop_wgmma(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, T* y,
                const __grid_constant__ Conv z, const __grid_constant__ Box box) {
  unsigned char* const stages = shared_memory + (-shared_address(shared_memory) & 1023);
  Barrier *const full = (Barrier*)(stages + STAGES * STAGE), *const empty = full + STAGES;
  const int across = (z.K + BN - 1) / BN, k0 = blockIdx.x % across * BN;
  const int columns = (z.Q + box.W - 1) / box.W, rows = (z.P + box.H - 1) / box.H, tile = blockIdx.x / across;
  const int q0 = tile % columns * box.W, p0 = tile / columns % rows * box.H, n0 = tile / columns / rows * box.I;
  const int deep = (z.C + DEPTH - 1) / DEPTH, steps = z.R * z.S * deep;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; s++) barrier_init(full + s, 1), barrier_init(empty + s, 2);
    barriers_made();
  }
  __syncthreads();

  if (threadIdx.x < GROUP) {  // copies
    fewer_registers<24>();
    if (threadIdx.x) return;
    for (int step = 0; step < steps; step++) {
      const int s = step % STAGES, turn = step / STAGES, tap = step / deep, c = step % deep * DEPTH;
      wait_for(empty + s, (turn & 1) ^ 1);  // at once on the first turn
      arrive_and_expect(full + s, STAGE);
      copy_tile(stages + s * STAGE, &x, full + s, c, q0 * z.v - z.b + tap % z.S * z.m, p0 * z.u - z.a + tap / z.S * z.l, n0);
      copy_tile(stages + s * STAGE + A_BYTES, &w, full + s, c, tap, k0);
    }
    return;
  }

  more_registers<240>();  // multiplies
  const int half = threadIdx.x / GROUP - 1;  // of the tile's rows
  float sum[BN / 8][4];
  for (int step = 0; step < steps; step++) {
    const int s = step % STAGES;
    const unsigned char *a = stages + s * STAGE + half * 64 * 128, *b = stages + s * STAGE + A_BYTES;
    wait_for(full + s, step / STAGES & 1);
    products_begin();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) Warpgroup<T>::product(sum, matrix(a + 32 * k), matrix(b + 32 * k), step | k);
    products_begun();
    products_done<1>();  // those of the step before: its stage may be filled again
    if (step && threadIdx.x % GROUP == 0) arrive(empty + (step - 1) % STAGES);
  }
  products_done<0>();

  struct alignas(2 * sizeof(T)) Two { T a, b; };
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int lower = 0; lower < 2; lower++) {
    const int m = half * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4 + 8 * lower;
    const int q = q0 + m % box.W, p = p0 + m / box.W % box.H, n = n0 + m / box.W / box.H;
    if (q >= z.Q || p >= z.P || n >= z.N) continue;
    T* const to = y + ((n * z.P + p) * z.Q + q) * z.K;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
      const int k = k0 + 8 * j + lane % 4 * 2;  // K is even
      if (k < z.K) *(Two*)(to + k) = {narrow<T>(sum[j][2 * lower]), narrow<T>(sum[j][2 * lower + 1])};
    }
  }
}
