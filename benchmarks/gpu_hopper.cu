// Single instructions of Hopper (sm_90a), asked by gpu_hopper.py on hardware and in the interpreter: a copy of a tile by TMA, a
// product of a warpgroup by wgmma, and the phases of mbarriers. Each is as kernels/conv2d/07_tma_wgmma.cu uses it.
#include "types.cuh"
#include "mma.cuh"
#include "hopper.cuh"

extern __shared__ __align__(1024) unsigned char shared_memory[];

__forceinline__ unsigned char* aligned() { return shared_memory + (-shared_address(shared_memory) & 1023); }

__forceinline__ void copy_tile(void* to, const TensorMap* map, Barrier* b, int c0, int c1) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
                   "r"(shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1)
               : "memory");
}

struct Corner {
  int axes, c[4];
};

// A tile of `bytes` bytes, as it lies in shared memory.
extern "C" __global__ void __launch_bounds__(128)
    tile(const __grid_constant__ TensorMap map, const __grid_constant__ Corner at, int bytes, unsigned* out) {
  unsigned char* const to = aligned();
  Barrier* const full = (Barrier*)(to + (bytes + 1023) / 1024 * 1024);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barriers_made();
    arrive_and_expect(full, bytes);
    if (at.axes == 2) copy_tile(to, &map, full, at.c[0], at.c[1]);
    if (at.axes == 3) copy_tile(to, &map, full, at.c[0], at.c[1], at.c[2]);
    if (at.axes == 4) copy_tile(to, &map, full, at.c[0], at.c[1], at.c[2], at.c[3]);
  }
  __syncthreads();
  wait_for(full, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += 128) out[i] = ((unsigned*)to)[i];
}

#ifdef COLUMNS
// The bits of a matrix descriptor that say where it begins.
__forceinline__ unsigned long long place(const void* p) { return (shared_address(p) & 0x3ffff) >> 4; }

// d (64 x COLUMNS) = a (64 x 16 TIMES) b (COLUMNS x 16 TIMES), rows of a and b `row` bytes long; `mode`: the bits of a matrix
// descriptor that say how they lie. The first product does not add to what was in d.
extern "C" __global__ void __launch_bounds__(128)
    product(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, unsigned long long mode, int row, float* out) {
  unsigned char *const to_a = aligned(), *const to_b = to_a + 64 * row;
  Barrier* const full = (Barrier*)(to_b + COLUMNS * row);
  if (threadIdx.x == 0) {
    barrier_init(full, 1);
    barriers_made();
    arrive_and_expect(full, (64 + COLUMNS) * row);
    copy_tile(to_a, &a, full, 0, 0);
    copy_tile(to_b, &b, full, 0, 0);
  }
  __syncthreads();
  wait_for(full, 0);
  float d[COLUMNS / 8][4];
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; j++)
    for (int i = 0; i < 4; i++) d[j][i] = 1e9f;
  products_begin();
#pragma unroll
  for (int k = 0; k < TIMES; k++)
    Warpgroup<T>::product(d, place(to_a + 32 * k) | mode, place(to_b + 32 * k) | mode, k);
  products_begun();
  products_done<0>();
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; j++)
    for (int i = 0; i < 4; i++) out[(j * 4 + i) * 128 + threadIdx.x] = d[j][i];
}
#endif

// Numbers handed from a warp to another through two places in turn. `full` and `empty` change their phase once per turn of the
// ring; 32 arrivals each. out[turn][lane]: what the second warp was handed by the neighbour of its lane.
extern "C" __global__ void __launch_bounds__(64) phases(const unsigned* from, unsigned* out, int turns) {
  constexpr int PLACES = 2;
  __shared__ Barrier full[PLACES], empty[PLACES];
  __shared__ unsigned place[PLACES][32];
  if (threadIdx.x == 0) {
    for (int s = 0; s < PLACES; s++) barrier_init(full + s, 32), barrier_init(empty + s, 32);
    barriers_made();
  }
  __syncthreads();
  const int lane = threadIdx.x % 32;
  for (int turn = 0; turn < turns; turn++) {
    const int s = turn % PLACES, round = turn / PLACES;
    if (threadIdx.x < 32) {
      wait_for(empty + s, (round & 1) ^ 1);  // at once on the first round
      place[s][lane] = from[32 * turn + lane];
      arrive(full + s);
    } else {
      wait_for(full + s, round & 1);
      out[32 * turn + lane] = place[s][(lane + 1) % 32];
      arrive(empty + s);
    }
  }
}
