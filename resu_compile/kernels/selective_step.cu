// One selective step. A sample tells about where the threshold will be; one pass over all places
// then brings the averages up to date, counts what is above and lists the keys in question and the
// marked places above them, with their steps. The digits of the threshold come from the short list,
// and the update touches the listed weights alone. Where the sample misled (which the exact counts
// of the pass show) or a list was too short, the same kernels take the digits and the update from
// the whole tensors.
//
// Follows radix_select.cu; the rounding is that of PyTorch's own kernels (mul_, then add_ with
// alpha as one fused multiply-add), so that C > tau falls alike.
//
// Also defined by the including source: WEIGHT_KIND, as KEY_KIND; PARTS, blocks that share a
// segment of the lists in the update.

// m and v of four places in place, their direction m / (v + delta); returns the marks C > tau.
__device__ __forceinline__ u32 averages4(const Args& a, u32 valid, const float g[QUAD],
                                         float m[QUAD], float v[QUAD], float direction[QUAD]) {
  u32 marked = 0u;
#pragma unroll
  for (int j = 0; j < QUAD; ++j) {
    if (valid >> j & 1u) {
      m[j] = __fmaf_rn(g[j], a.rest, __fmul_rn(m[j], a.beta));
      v[j] = __fmaf_rn(fabsf(g[j]), a.rest, __fmul_rn(v[j], a.beta));
    }
    direction[j] = __fdiv_rn(m[j], __fadd_rn(v[j], a.delta));
    if (valid >> j & 1u) marked |= (u32)(fabsf(direction[j]) > a.tau) << j;
  }
  return marked;
}

__device__ __forceinline__ float step_of(const Args& a, float direction, float g) {
  return __fmul_rn(fabsf(direction), a.adaptive ? direction : g);
}

__device__ __forceinline__ float moved(const Args& a, float w, float step) {
  if (a.decay != 0.0f) step = __fmaf_rn(w, a.decay, step);
  return __fmaf_rn(step, -a.lr, w);
}

// -- sample ----------------------------------------------------------------------------------
// Bounds of the threshold: the bins of the sampled ranks, eight standard errors to each side.
__device__ void bound_threshold(const Args& a, float share) {
  __shared__ u32 lo[2], hi[2];
  constexpr int OWN = FINE / THREADS;
  for (int c = 0; c < 2; ++c) {
    const float rank = a.want[c] * share, margin = 8.0f * sqrtf(rank) + 16.0f;
    const u32 far = (u32)(rank + margin) + 1u, near = rank > margin ? (u32)(rank - margin) : 0u;
    if (threadIdx.x == 0) lo[c] = 0u, hi[c] = near ? 0u : ALL;
    const u32 first = FINE - OWN * (threadIdx.x + 1);
    u32 h[OWN], sum = 0, total;
#pragma unroll
    for (int j = 0; j < OWN; j += 4) {
      uint4 q = __ldcg((const uint4*)(a.fine + FINE + first + j));
      if (c == 0) {
        const uint4 other = __ldcg((const uint4*)(a.fine + first + j));
        q.x += other.x, q.y += other.y, q.z += other.z, q.w += other.w;
      }
      h[j] = q.x, h[j + 1] = q.y, h[j + 2] = q.z, h[j + 3] = q.w;
      sum += q.x + q.y + q.z + q.w;
    }
    u32 above = block_scan(sum, total) - sum;
#pragma unroll
    for (int j = OWN - 1; j >= 0; --j) {
      const u32 upto = above + h[j];
      if (above < far && far <= upto) lo[c] = (first + j) << 18;
      if (near && above < near && near <= upto) hi[c] = (first + j) << 18 | 0x3ffffu;
      above = upto;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    a.state->lo = max(lo[0], lo[1]);
    a.state->width = max(hi[0], hi[1]) - max(lo[0], lo[1]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) step_sample(Args a) {
  const u64 quads = (a.numel + QUAD - 1) / QUAD, sampled = (u64)gridDim.x * THREADS;
  const u32 q = blockIdx.x * THREADS + threadIdx.x;
  u64 quad = q;
  if (quads > sampled) {  // one of each stretch, so that no period of the weight meets the stride
    u32 hash = q * 2654435761u;
    hash = (hash ^ hash >> 15) * 2246822519u;
    quad = q * quads / sampled + (hash ^ hash >> 13) % (u32)(quads / sampled);
  }
  const u64 i = quad * QUAD;
  float g[QUAD], m[QUAD], v[QUAD], direction[QUAD];
  load4<KEY_KIND, false>(a.source, i, a.numel, g);
  load4<0, false>(a.ema, i, a.numel, m);
  load4<0, false>(a.ema_abs, i, a.numel, v);
  const u32 valid = inside4(i, a.numel) & ~bits4(a.bits, i, a.numel);
  const u32 marked = averages4(a, valid, g, m, v, direction);
#pragma unroll
  for (int j = 0; j < QUAD; ++j)
    if (valid >> j & 1u)
      atomicAdd(a.fine + (marked >> j & 1u) * FINE + (key_of_magnitude(g[j]) >> 18), 1u);
  if (!is_last(a.state->done + 5)) return;
  bound_threshold(a, quads > sampled ? (float)(sampled * QUAD) / (float)a.numel : 1.0f);
}

// -- averages --------------------------------------------------------------------------------
// Appends to the block's segments; ``length`` counts on past the room.
struct Lists {
  u32* key;
  u32* place;
  float* step;
  u32* sure_place;
  float* sure_step;
  __device__ __forceinline__ explicit Lists(const Args& a, u32 segment)
      : key(a.window_key + (u64)segment * a.window_room),
        place(a.window_place + (u64)segment * a.window_room),
        step(a.window_step + (u64)segment * a.window_room),
        sure_place(a.sure_place + (u64)segment * a.sure_room),
        sure_step(a.sure_step + (u64)segment * a.sure_room) {}
};

template <bool SELECT>
__device__ __forceinline__ void averages(const Args& a) {
  __shared__ u32 own[SELECT ? 2 * BINS : 1];
  __shared__ u32 length[2], above[2];
  State* s = a.state;
  const u32 lo = SELECT ? s->lo : 0u, width = SELECT ? s->width : 0u, hi = lo + width;
  const u32 open = 32 - __clz(width | 1u), shift = open > 11 ? open - 11 : 0;
  const u32 lane = threadIdx.x & 31;
  const Lists lists(a, blockIdx.x);
  if (SELECT) {
    if (threadIdx.x < 2) length[threadIdx.x] = above[threadIdx.x] = 0u;
    clear(own);
  }
  u32 higher = 0, higher_marked = 0;
  const u64 tiles = (a.numel + 2 * TILE - 1) / (2 * TILE);
  for (u64 t = blockIdx.x; t < tiles; t += gridDim.x) {
    const u64 i = t * (2 * TILE) + threadIdx.x * QUAD;
    float g[2][QUAD], m[2][QUAD], v[2][QUAD];
    u32 valid[2], marked[2], window[2] = {0u, 0u}, sure[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      load4<KEY_KIND, true>(a.source, i + r * TILE, a.numel, g[r]);
      load4<0, true>(a.ema, i + r * TILE, a.numel, m[r]);
      load4<0, true>(a.ema_abs, i + r * TILE, a.numel, v[r]);
      valid[r] = inside4(i + r * TILE, a.numel) & ~bits4(a.bits, i + r * TILE, a.numel);
    }
    float step[2][QUAD];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const u64 at = i + r * TILE;
      float direction[QUAD];
      marked[r] = averages4(a, valid[r], g[r], m[r], v[r], direction);
      store4<0>(a.ema, at, a.numel, m[r]);
      store4<0>(a.ema_abs, at, a.numel, v[r]);
      if (!SELECT) continue;
      const u32 neighbour = __shfl_down_sync(ALL, marked[r], 1);  // the other half of the byte
      if (!(threadIdx.x & 1) && at < a.numel) a.marked[at >> 3] = marked[r] | neighbour << 4;
      u32 over = 0u;
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        step[r][j] = step_of(a, direction[j], g[r][j]);
        const u32 key = key_of_magnitude(g[r][j]), x = key - lo;
        over |= (u32)(key > hi) << j;
        if ((valid[r] >> j & 1u) && x <= width) {
          window[r] |= 1u << j;
          atomicAdd(own + (marked[r] >> j & 1u) * BINS + (x >> shift), 1u);
        }
      }
      over &= valid[r];
      sure[r] = over & marked[r];
      higher += __popc(over);
      higher_marked += __popc(sure[r]);
    }
    if (!SELECT) continue;
    // entries before this thread's in the warp, of both lists in one scan
    const u32 mine = __popc(window[0] | window[1] << 4) | __popc(sure[0] | sure[1] << 4) << 16;
    u32 upto = mine;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const u32 y = __shfl_up_sync(ALL, upto, d);
      if (lane >= d) upto += y;
    }
    u32 base = 0, sure_base = 0;
    if (lane == 31 && upto) {
      base = atomicAdd(length, upto & 0xffffu);
      sure_base = atomicAdd(length + 1, upto >> 16);
    }
    u32 e = __shfl_sync(ALL, base, 31) + ((upto - mine) & 0xffffu);
    u32 f = __shfl_sync(ALL, sure_base, 31) + ((upto - mine) >> 16);
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        if (window[r] >> j & 1u) {
          if (e < a.window_room) {
            lists.key[e] = key_of_magnitude(g[r][j]) | (marked[r] >> j & 1u);
            lists.place[e] = (u32)(i + r * TILE + j);
            lists.step[e] = step[r][j];
          }
          ++e;
        }
        if (sure[r] >> j & 1u) {
          if (f < a.sure_room) {
            lists.sure_place[f] = (u32)(i + r * TILE + j);
            lists.sure_step[f] = step[r][j];
          }
          ++f;
        }
      }
  }
  if (!SELECT) return;
  if (higher) atomicAdd(above, higher);
  if (higher_marked) atomicAdd(above + 1, higher_marked);
  __syncthreads();
  if (threadIdx.x == 0) {
    a.lengths[blockIdx.x] = length[0];
    a.lengths[a.segments + blockIdx.x] = length[1];
    if (length[0] > a.window_room || length[1] > a.sure_room) s->overflow = 1u;
    atomicAdd(s->above, above[0]);
    atomicAdd(s->above + 1, above[1]);
  }
  if (!add_counts(own, a.hist, s->done)) return;
  u32 want[2];
  bool misled = __ldcg(&s->overflow);
  for (int c = 0; c < 2; ++c) {
    const u32 counted = __ldcg(s->above + c);
    misled |= counted >= a.want[c];  // the threshold is above those in question
    want[c] = counted < a.want[c] ? a.want[c] - counted : 0u;
  }
  const bool reached = pick(a.hist, want, shift, s);
  if (threadIdx.x != 0) return;
  misled |= !reached && lo;  // it is below
  s->listed = !misled;
  if (misled) {
    s->prefix = s->lo = 0u;
    s->width = ALL;
    s->shift = 32;
    s->want[0] = a.want[0];
    s->want[1] = a.want[1];
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_averages(Args a) {
  averages<false>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_select(Args a) {
  averages<true>(a);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit1(Args a) {
  count_digits<true>(a, 1);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit2(Args a) {
  count_digits<true>(a, 2);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_digit3(Args a) {
  count_digits<true>(a, 3);
}
extern "C" __global__ void __launch_bounds__(THREADS) step_ties(Args a) { cut_ties<true>(a); }

// -- update ----------------------------------------------------------------------------------
#define BATCH 4  // independent loads in flight of a thread

__device__ __forceinline__ float load1(const void* base, u32 i) {
  if (WEIGHT_KIND == 0) return ((const float*)base)[i];
  return widen<WEIGHT_KIND>(((const unsigned short*)base)[i]);
}

__device__ __forceinline__ void store1(void* base, u32 i, float x) {
  if (WEIGHT_KIND == 0)
    ((float*)base)[i] = x;
  else
    ((unsigned short*)base)[i] = narrow<WEIGHT_KIND>(x);
}

// Moves the listed weights; ``taken`` says which entries of the list.
template <typename Taken>
__device__ __forceinline__ void move_listed(const Args& a, const u32* places, const float* steps,
                                            u32 length, Taken taken) {
  const u32 first = blockIdx.x % PARTS * THREADS + threadIdx.x;
  for (u32 e = first; e < length; e += BATCH * PARTS * THREADS) {
    u32 place[BATCH];
    float step[BATCH], w[BATCH];
    bool take[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const u32 at = e + k * PARTS * THREADS;
      take[k] = at < length;
      place[k] = take[k] ? places[at] : 0u;
      step[k] = take[k] ? steps[at] : 0.0f;
      take[k] = take[k] && taken(at, place[k]);
    }
#pragma unroll
    for (int k = 0; k < BATCH; ++k) w[k] = take[k] ? load1(a.weight, place[k]) : 0.0f;
#pragma unroll
    for (int k = 0; k < BATCH; ++k)
      if (take[k]) store1(a.weight, place[k], moved(a, w[k], step[k]));
  }
}

__device__ __forceinline__ void move_all(const Args& a, const Threshold& threshold) {
  const u64 quads = (a.numel + QUAD - 1) / QUAD;
  for (u64 q = (u64)blockIdx.x * THREADS + threadIdx.x; q < quads;
       q += (u64)gridDim.x * THREADS) {
    const u64 i = q * QUAD;
    u32 chosen = bits4(a.marked, i, a.numel);  // marked places are valid
    if (!chosen) continue;
    float g[QUAD], m[QUAD], v[QUAD], w[QUAD];
    load4<KEY_KIND, true>(a.source, i, a.numel, g);
#pragma unroll
    for (int j = 0; j < QUAD; ++j)
      if (!threshold.takes(key_of_magnitude(g[j]), i + j)) chosen &= ~(1u << j);
    if (!chosen) continue;
    load4<0, true>(a.ema, i, a.numel, m);
    load4<0, true>(a.ema_abs, i, a.numel, v);
    load4<WEIGHT_KIND, true>(a.weight, i, a.numel, w);
#pragma unroll
    for (int j = 0; j < QUAD; ++j) {
      const float direction = __fdiv_rn(m[j], __fadd_rn(v[j], a.delta));
      if (chosen >> j & 1u) w[j] = moved(a, w[j], step_of(a, direction, g[j]));
    }
    store4<WEIGHT_KIND>(a.weight, i, a.numel, w);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) step_update(Args a) {
  const Threshold threshold(a.state);
  if (!a.state->listed) {
    move_all(a, threshold);
    return;
  }
  const u32 segment = blockIdx.x / PARTS;
  const Lists lists(a, segment);
  move_listed(a, lists.sure_place, lists.sure_step, a.lengths[a.segments + segment],
              [](u32, u32) { return true; });
  move_listed(a, lists.place, lists.step, a.lengths[segment], [&](u32 e, u32 place) {
    const u32 key = lists.key[e];
    return (key & 1u) && threshold.takes(key & ~1u, place);
  });
}
