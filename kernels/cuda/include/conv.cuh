// One convolution, in cuDNN's letters (kernels/README.md). x (N, H, W, C), y and dy (N, P, Q, K) in memory, w (K, C/groups,
// R, S); stride (u, v), padding (a, b), dilation (l, m). Cg = C/groups, Kg = K/groups.
struct Conv {
  int N, H, W, C, K, P, Q, R, S, u, v, a, b, l, m, Cg, Kg;
};
