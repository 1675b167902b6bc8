// Tensor cores and the copies that feed them, as PTX (sm_80 and later). Layouts: PTX ISA, sections on mma.m16n8k16, mma.m16n8k8
// and ldmatrix. Lane l of a warp is in group g = l / 4 at place q = l % 4.

__forceinline__ unsigned shared_address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }

// 16 bytes on their way from memory to shared memory, or 16 bytes of zeros where `from` is null.
__forceinline__ void copy_async(void* to, const void* from, const void* valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from ? from : valid),
               "r"(from ? 16 : 0)
               : "memory");
}
__forceinline__ void copies_begun() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most N of the groups begun are still under way.
template <int N> __forceinline__ void copies_done() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Register i of lane l holds
// row g, columns 2q and 2q + 1 of matrix i, or with `transposed` column g, rows 2q and 2q + 1.
template <bool transposed> __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  if (transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// d (16 x 8) += a (16 x 16) b (16 x 8), added up in float. d[0], d[1]: row g, columns 2q and 2q + 1; d[2], d[3]: row g + 8.
#define MINIRES_MMA(shape, type)                                                                                    \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                              \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                                \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

template <class S> __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]);
// TF32, 8 deep: of the bits of a float, those of 10 digits after the point count.
template <> __forceinline__ void mma<float>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MINIRES_MMA("m16n8k8", "tf32");
}
template <> __forceinline__ void mma<fp16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MINIRES_MMA("m16n8k16", "f16");
}
template <> __forceinline__ void mma<bf16>(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MINIRES_MMA("m16n8k16", "bf16");
}

// x rounded to TF32, to nearest, ties away from zero.
__forceinline__ unsigned tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}
