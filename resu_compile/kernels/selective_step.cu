// One selective step: averages and the first digit in one pass, two more digits, ties, update.
//
// Follows radix_select.cu; the rounding is that of PyTorch's own kernels (mul_, then add_ with
// alpha as one fused multiply-add), so that C > tau falls alike.
//
// Also defined by the including source: WEIGHT_KIND, as KEY_KIND.

__device__ __forceinline__ float direction_of(float ema, float ema_abs, float delta) {
  return __fdiv_rn(ema, __fadd_rn(ema_abs, delta));
}

// m, v and the marks C > tau of four places; returns the marks.
__device__ __forceinline__ u32 averages4(const Args& a, u64 i, u32 valid, const float g[QUAD],
                                         float m[QUAD], float v[QUAD]) {
  u32 marked = 0u;
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    if (valid >> j & 1u) {
      m[j] = __fmaf_rn(g[j], a.rest, __fmul_rn(m[j], a.beta));
      v[j] = __fmaf_rn(fabsf(g[j]), a.rest, __fmul_rn(v[j], a.beta));
      marked |= (u32)(fabsf(direction_of(m[j], v[j], a.delta)) > a.tau) << j;
    }
  }
  store4<0>(a.ema, i, a.numel, m);
  store4<0>(a.ema_abs, i, a.numel, v);
  return marked;
}

template <bool COUNT>
__device__ __forceinline__ void averages(const Args& a) {
  __shared__ u32 own[COUNT ? 2 * BINS : 1];
  if (COUNT) clear(own);
  const u64 tiles = (a.numel + 2 * TILE - 1) / (2 * TILE);
  for (u64 t = blockIdx.x; t < tiles; t += gridDim.x) {
    const u64 i = t * (2 * TILE) + threadIdx.x * QUAD;
    float g[2][QUAD], m[2][QUAD], v[2][QUAD];
    u32 valid[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      load4<KEY_KIND, false>(a.source, i + r * TILE, a.numel, g[r]);
      load4<0, true>(a.ema, i + r * TILE, a.numel, m[r]);
      load4<0, true>(a.ema_abs, i + r * TILE, a.numel, v[r]);
      valid[r] = inside4(i + r * TILE, a.numel) & ~bits4(a.bits, i + r * TILE, a.numel);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u64 at = i + r * TILE;
      const u32 marked = averages4(a, at, valid[r], g[r], m[r], v[r]);
      if (!COUNT) continue;
      const u32 neighbour = __shfl_down_sync(NONE, marked, 1);  // the other half of the byte
      if (!(threadIdx.x & 1) && at < a.numel) a.marked[at >> 3] = marked | neighbour << 4;
#pragma unroll
      for (int j = 0; j < QUAD; ++j)
        if (valid[r] >> j & 1u)
          atomicAdd(own + (marked >> j & 1u) * BINS + (key_of_magnitude(g[r][j]) >> 21), 1u);
    }
  }
  if (COUNT) add_and_pick(a, own, 0, 21);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_averages(Args a) {
  averages<false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit0(Args a) {
  averages<true>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit1(Args a) {
  count_digits<true>(a, 1, 10, 11);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit2(Args a) {
  count_digits<true>(a, 2, 0, 10);
}
extern "C" __global__ void __launch_bounds__(THREADS) step_ties(Args a) { cut_ties<true>(a); }

extern "C" __global__ void __launch_bounds__(THREADS) step_update(Args a) {
  const Threshold threshold(a.state);
  const u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * QUAD;
  u32 chosen = bits4(a.marked, i, a.numel);  // marked places are valid
  if (!chosen) return;
  float g[QUAD], m[QUAD], v[QUAD], w[QUAD];
  load4<KEY_KIND, true>(a.source, i, a.numel, g);
#pragma unroll
  for (int j = 0; j < QUAD; ++j)
    if (!threshold.takes(key_of_magnitude(g[j]), i + j)) chosen &= ~(1u << j);
  if (!chosen) return;
  load4<0, true>(a.ema, i, a.numel, m);
  load4<0, true>(a.ema_abs, i, a.numel, v);
  load4<WEIGHT_KIND, true>(a.weight, i, a.numel, w);
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    const float direction = direction_of(m[j], v[j], a.delta);
    float update = __fmul_rn(fabsf(direction), a.adaptive ? direction : g[j]);
    if (a.decay != 0.0f) update = __fmaf_rn(w[j], a.decay, update);
    if (chosen >> j & 1u) w[j] = __fmaf_rn(update, -a.lr, w[j]);
  }
  store4<WEIGHT_KIND>(a.weight, i, a.numel, w);
}
