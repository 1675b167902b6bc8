// What only sm_90a has: copies of whole tiles by the tensor memory accelerator (TMA), barriers that count their bytes, and
// products of whole warpgroups (128 threads) from shared memory. Source: PTX ISA, sections on cp.async.bulk.tensor, mbarrier,
// wgmma ("Matrix Descriptor Format") and setmaxnreg. Include after types.cuh and mma.cuh.

struct alignas(64) TensorMap { unsigned long long words[16]; };  // the driver makes it (cuda/tensor_map.py)
using Barrier = unsigned long long;

// A phase of the barrier is over when `arrivals` threads have arrived and all announced bytes have landed.
__forceinline__ void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}
__forceinline__ void barriers_made() {  // shown to TMA, too
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");
}
__forceinline__ void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__forceinline__ void arrive_and_expect(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
// Wait for the end of the phase of this parity: 0 for the first.
__forceinline__ void wait_for(Barrier* b, int parity) {
  int done;
  do
    asm volatile("{ .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.b32 %0, 1, 0, p; }"
                 : "=r"(done)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
  while (!done);
}

// The box of a tensor that begins at these coordinates, on its way to shared memory; zeros where it leaves the tensor.
__forceinline__ void copy_tile(void* to, const TensorMap* map, Barrier* b, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
               "[%2];" ::"r"(shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}
__forceinline__ void copy_tile(void* to, const TensorMap* map, Barrier* b, int c0, int c1, int c2) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
                   "r"(shared_address(to)),
               "l"(map), "r"(shared_address(b)), "r"(c0), "r"(c1), "r"(c2)
               : "memory");
}

// Registers per thread of this warpgroup from now on: those that one gives up, another may take.
template <int N> __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// A matrix whose rows are 128 bytes (64 numbers) along the sum, swizzled by 128 bytes, 8 rows 1024 bytes apart.
__forceinline__ unsigned long long matrix(const void* p) {
  return (unsigned long long)((shared_address(p) & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// d (64 x N) += a (64 x 16) b (N x 16), once it is waited for; d is a's where `add` is 0. Thread t of the warpgroup has row
// 16 (t / 32) + t % 32 / 4 (and 8 more for d[j][2], d[j][3]), columns 8 j + 2 (t % 4) and the next.
__forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__forceinline__ void products_begun() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __forceinline__ void products_done() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

#define MINIRES_D4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define MINIRES_D16(j) MINIRES_D4(j), MINIRES_D4(j + 1), MINIRES_D4(j + 2), MINIRES_D4(j + 3)
#define MINIRES_WGMMA_64(type)                                                                                            \
  asm volatile("{ .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"                                                              \
               " wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                              \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"                           \
               : MINIRES_D16(0), MINIRES_D16(4)                                                                          \
               : "l"(a), "l"(b), "r"(add))
#define MINIRES_WGMMA_128(type)                                                                                           \
  asm volatile("{ .reg .pred p;\n setp.ne.b32 p, %66, 0;\n"                                                              \
               " wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                             \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "  \
               "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "    \
               "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "    \
               "%62, %63}, %64, %65, p, 1, 1, 0, 0; }"                                                                   \
               : MINIRES_D16(0), MINIRES_D16(4), MINIRES_D16(8), MINIRES_D16(12)                                         \
               : "l"(a), "l"(b), "r"(add))

template <class S> struct Warpgroup;
template <> struct Warpgroup<bf16> {
  __forceinline__ static void product(float (&d)[8][4], unsigned long long a, unsigned long long b, int add) { MINIRES_WGMMA_64("bf16"); }
  __forceinline__ static void product(float (&d)[16][4], unsigned long long a, unsigned long long b, int add) { MINIRES_WGMMA_128("bf16"); }
};
template <> struct Warpgroup<fp16> {
  __forceinline__ static void product(float (&d)[8][4], unsigned long long a, unsigned long long b, int add) { MINIRES_WGMMA_64("f16"); }
  __forceinline__ static void product(float (&d)[16][4], unsigned long long a, unsigned long long b, int add) { MINIRES_WGMMA_128("f16"); }
};
