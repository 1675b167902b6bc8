// What arrays hold, and what is computed with: -DNUMBER=float (the default), double, fp16 or bf16. 16-bit numbers are computed
// with as float. No header of CUDA's is needed.
#ifndef NUMBER
#define NUMBER float
#endif

struct fp16 { unsigned short bits; };
struct bf16 { unsigned short bits; };
using T = NUMBER;  // in memory

template <class S> struct Computed { using type = float; };
template <> struct Computed<double> { using type = double; };
using real = Computed<T>::type;  // in registers

__forceinline__ float wide(float x) { return x; }
__forceinline__ double wide(double x) { return x; }
__forceinline__ float wide(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__forceinline__ float wide(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

// Rounded to nearest, ties to even.
template <class S> __forceinline__ S narrow(real x) { return x; }
template <> __forceinline__ fp16 narrow<fp16>(real x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"((float)x));
  return y;
}
template <> __forceinline__ bf16 narrow<bf16>(real x) {
  unsigned bits = __float_as_uint((float)x);
  bits = x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fffffff;
  return {(unsigned short)(bits >> 16)};
}
