// Tiles of tensor cores: 128 rows x COLUMNS, 64 bytes deep, three under way; conv_tiles.cuh says where their numbers come from.
// 8 warps, 4 x 2, each with 32 rows and half of the columns. Steps 5 and 6 of the convolution are made of this.
#include "types.cuh"
#include "mma.cuh"

#ifndef COLUMNS
#define COLUMNS 128
#endif
#ifndef SPLIT
#define SPLIT 1
#endif
using number = T;
constexpr int BM = 128, BN = COLUMNS, BK = 64 / sizeof(T), THREADS = 256, STAGES = 3;
constexpr int WARP_COLUMNS = BN / 2, NT = WARP_COLUMNS / 8;  // matrices of 8 columns per warp
#include "conv_tiles.cuh"
constexpr int STEP = 2 * V;  // depths of one mma
constexpr int RESIDENT = SPLIT == 3 && BN == 128 ? 1 : 2;  // blocks of an SM; split fragments do not fit into 128 registers

constexpr int A_SIZE = BM * BK, B_SIZE = BN * BK;  // numbers of a stage; STAGES * (A_SIZE + B_SIZE) are asked for at launch
extern __shared__ __align__(128) unsigned char shared_memory[];

// Where piece `chunk` (V numbers) of a tile's line lies. Along the sum a line is a row of 4 pieces, else a depth of WIDTH / V.
template <int WIDTH> __forceinline__ int place(const AlongSum<WIDTH>&, int row, int chunk) {
  return row * BK + ((chunk ^ (row >> 1 & 3)) * V);
}
template <int WIDTH> __forceinline__ int place(const AlongRows<WIDTH>&, int depth, int chunk) {
  const int turn = sizeof(T) == 4 ? 2 * (depth & 3) : WIDTH == 32 ? depth >> 1 & 3 : depth & 7;
  return depth * WIDTH + ((chunk ^ turn) * V);
}
template <int WIDTH> __forceinline__ int place_piece(const AlongSum<WIDTH>& l, int i) {
  return place(l, l.row(i), l.depth(i) / V);
}
template <int WIDTH> __forceinline__ int place_piece(const AlongRows<WIDTH>& l, int i) {
  return place(l, l.depth(i), l.row(i) / V);
}

// A float of a tile whose pieces run along its rows.
template <int WIDTH> __forceinline__ unsigned bits(const AlongRows<WIDTH>& l, const T* tile, int depth, int row) {
  return *(const unsigned*)(tile + place(l, depth, row / V) + row % V);
}

// The fragment of a for rows row0 ... row0 + 15 and depths k0 ... k0 + STEP - 1.
template <int WIDTH>
__forceinline__ void fragment_a(const AlongSum<WIDTH>& l, unsigned (&r)[4], const T* tile, int row0, int k0) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(r, tile + place(l, row0 + lane % 16, k0 / V + lane / 16));
}
template <int WIDTH>
__forceinline__ void fragment_a(const AlongRows<WIDTH>& l, unsigned (&r)[4], const T* tile, int row0, int k0) {
  const int lane = threadIdx.x % 32;
  if (sizeof(T) == 4) {
    const int k = k0 + lane % 4, row = row0 + lane / 4;
    r[0] = bits(l, tile, k, row), r[1] = bits(l, tile, k, row + 8);
    r[2] = bits(l, tile, k + 4, row), r[3] = bits(l, tile, k + 4, row + 8);
  } else {
    load_matrices<true>(r, tile + place(l, k0 + lane % 8 + lane / 16 * 8, row0 / V + lane / 8 % 2));
  }
}

// The fragments of b for columns n0 ... n0 + 7 in r[0], r[1] and n0 + 8 ... n0 + 15 in r[2], r[3].
template <int WIDTH>
__forceinline__ void fragment_b(const AlongSum<WIDTH>& l, unsigned (&r)[4], const T* tile, int n0, int k0) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(r, tile + place(l, n0 + lane % 8 + lane / 16 * 8, k0 / V + lane / 8 % 2));
}
template <int WIDTH>
__forceinline__ void fragment_b(const AlongRows<WIDTH>& l, unsigned (&r)[4], const T* tile, int n0, int k0) {
  const int lane = threadIdx.x % 32;
  if (sizeof(T) == 4) {
    const int k = k0 + lane % 4, n = n0 + lane / 4;
    r[0] = bits(l, tile, k, n), r[1] = bits(l, tile, k + 4, n);
    r[2] = bits(l, tile, k, n + 8), r[3] = bits(l, tile, k + 4, n + 8);
  } else {
    load_matrices<true>(r, tile + place(l, k0 + lane % 16, n0 / V + lane / 16));
  }
}

// What of a fragment TF32 can hold, and what it leaves.
template <int N> __forceinline__ void split(const unsigned (&x)[N], unsigned (&big)[N], unsigned (&small)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    big[i] = tf32(__uint_as_float(x[i]));
    small[i] = tf32(__uint_as_float(x[i]) - __uint_as_float(big[i]));
  }
}

// d += a b, by one product or, of split floats, by three, the small ones first.
__forceinline__ void product(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if (sizeof(T) == 2) return mma<T>(d, a, b);
  unsigned a_big[4], a_small[4], b_big[2], b_small[2];
  split(a, a_big, a_small);
  split(b, b_big, b_small);
  if (SPLIT == 3) {
    mma<T>(d, a_small, b_big);
    mma<T>(d, a_big, b_small);
  }
  mma<T>(d, a_big, b_big);
}

// What becomes of the pieces of a tile between their arrival and the product: nothing. (Step 6 has others.)
struct AsItIs {
  static constexpr int OPERANDS = 1;  // tiles that arrive for one that is multiplied
  __forceinline__ void forget_oldest() {}
  template <class L> __forceinline__ void copy(const L&, int, const T*, T*, const void*) {}
  template <class L> __forceinline__ void change(const L&, T*) {}
};

// sum[i][j] += rows 16 i ... by columns 8 j ... of this warp's part, over all tiles. valid: any address that may be read.
// change_a, change_b: what becomes of the tiles of a and b. A thread changes the pieces that it has copied itself, for which it
// need not wait for others, in the place where they lie; the barrier that follows anyway shows them to all.
template <class A, class B, class ChangeA, class ChangeB>
__forceinline__ void multiply(A& a, B& b, int tiles, const void* valid, float (&sum)[2][NT][4], ChangeA change_a,
                              ChangeB change_b) {
  constexpr int A_STAGE = A_SIZE * ChangeA::OPERANDS, B_STAGE = B_SIZE * ChangeB::OPERANDS;
  T* const as = (T*)shared_memory;
  T* const bs = as + STAGES * A_STAGE;
  const int warp = threadIdx.x / 32, row0 = warp / 2 * 32, n0 = warp % 2 * WARP_COLUMNS;
  auto fetch = [&](int tile) {
    change_a.forget_oldest(), change_b.forget_oldest();
    if (tile < tiles) {
      const int stage = tile % STAGES;
#pragma unroll
      for (int i = 0; i < A::LOADS; i++) {
        const T* from = a.at(i);
        T* to = as + stage * A_STAGE + place_piece(a, i);
        copy_async(to, from, valid);
        change_a.copy(a, i, from, to + A_SIZE, valid);
      }
#pragma unroll
      for (int i = 0; i < B::LOADS; i++)
        if (B::active()) {
          const T* from = b.at(i);
          T* to = bs + stage * B_STAGE + place_piece(b, i);
          copy_async(to, from, valid);
          change_b.copy(b, i, from, to + B_SIZE, valid);
        }
      a.next(), b.next();
    }
    copies_begun();  // an empty group at the end, so that counting them stays right
  };
  for (int tile = 0; tile < STAGES - 1; tile++) fetch(tile);
  for (int tile = 0; tile < tiles; tile++) {
    T *const x = as + tile % STAGES * A_STAGE, *const y = bs + tile % STAGES * B_STAGE;
    copies_done<STAGES - 2>();
    change_a.change(a, x), change_b.change(b, y);
    __syncthreads();  // this tile has arrived for all; and all are done with the one that fetch overwrites
    fetch(tile + STAGES - 1);
#pragma unroll
    for (int k0 = 0; k0 < BK; k0 += STEP) {
      unsigned u[2][4], v[NT / 2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) fragment_a(a, u[i], x, row0 + 16 * i, k0);
#pragma unroll
      for (int j = 0; j < NT / 2; j++) fragment_b(b, v[j], y, n0 + 16 * j, k0);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < NT; j++) product(sum[i][j], u[i], {v[j / 2][j % 2 * 2], v[j / 2][j % 2 * 2 + 1]});
    }
  }
}
template <class A, class B>
__forceinline__ void multiply(A& a, B& b, int tiles, const void* valid, float (&sum)[2][NT][4]) {
  multiply(a, b, tiles, valid, sum, AsItIs(), AsItIs());
}

// For each of this thread's rows of the tile: begin(row), an address or null; two columns at a time are written there.
template <class S, class F>
__forceinline__ void finish(const float (&sum)[2][NT][4], int n0, int columns, F begin) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  struct alignas(2 * sizeof(S)) Two { S a, b; };
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      S* to = begin(warp / 2 * 32 + 16 * i + 8 * half + lane / 4);
      if (!to) continue;
#pragma unroll
      for (int j = 0; j < NT; j++) {
        const int n = n0 + warp % 2 * WARP_COLUMNS + 8 * j + lane % 4 * 2;  // columns are even
        if (n < columns) *(Two*)(to + n) = {narrow<S>(sum[i][j][2 * half]), narrow<S>(sum[i][j][2 * half + 1])};
      }
    }
}
