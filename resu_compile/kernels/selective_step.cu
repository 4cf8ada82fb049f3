// One selective step. A sample tells about where the threshold will be; one pass over all places
// then brings the averages up to date, counts what is above and lists the keys in question and the
// marked places above them, with their steps. The digits of the threshold come from the short list,
// and the update touches the listed weights alone. Where the sample misled (which the exact counts
// of the pass show) or a list was too short, the digits and the update come from the whole tensors.
// All phases are one cooperative launch.
//
// Follows radix_select.cu; the rounding is that of PyTorch's own kernels (mul_, then add_ with
// alpha as one fused multiply-add), so that C > tau falls alike.
//
// Also defined by the including source: WEIGHT_KIND, as KEY_KIND; SAMPLE_BLOCKS.

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
#define SAMPLE_QUADS 2  // of a thread
#define FINE_SHIFT 19

// Bounds of the threshold: the bins of the sampled ranks, six standard errors to each side.
__device__ __forceinline__ void bound_threshold(const Args& a, float share) {
  __shared__ u32 lo[2], hi[2];
  constexpr int OWN = FINE / THREADS;
  const u32 first = FINE - OWN * (threadIdx.x + 1);
  u64 h[OWN];
  u32 sum[2] = {0u, 0u};
#pragma unroll
  for (int j = 0; j < OWN; ++j) h[j] = __ldcg(a.fine + first + j);
#pragma unroll
  for (int j = 0; j < OWN; ++j) sum[0] += (u32)h[j], sum[1] += (u32)(h[j] >> 32);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float rank = a.want[c] * share, margin = 6.0f * sqrtf(rank) + 16.0f;
    const u32 far = (u32)(rank + margin) + 1u, near = rank > margin ? (u32)(rank - margin) : 0u;
    if (threadIdx.x == 0) lo[c] = 0u, hi[c] = near ? 0u : ALL;
    u32 total, above = block_scan(sum[c], total) - sum[c];
#pragma unroll
    for (int j = OWN - 1; j >= 0; --j) {
      const u32 upto = above + (u32)(h[j] >> 32 * c);
      if (above < far && far <= upto) lo[c] = (first + j) << FINE_SHIFT;
      if (near && above < near && near <= upto)
        hi[c] = (first + j) << FINE_SHIFT | ((1u << FINE_SHIFT) - 1u);
      above = upto;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    a.state->lo = max(lo[0], lo[1]);
    a.state->width = max(hi[0], hi[1]) - max(lo[0], lo[1]);
    release(a.state, 1);
  }
}

__device__ __forceinline__ void sample(const Args& a, u32* own) {
  const u64 quads = (a.numel + QUAD - 1) / QUAD;
  const u32 blocks = min(gridDim.x, SAMPLE_BLOCKS), sampled = blocks * THREADS * SAMPLE_QUADS;
  if (blockIdx.x >= blocks) return;
  for (int b = threadIdx.x; b < FINE; b += THREADS) own[b] = 0u;
  __syncthreads();
  float g[SAMPLE_QUADS][QUAD], m[SAMPLE_QUADS][QUAD], v[SAMPLE_QUADS][QUAD], direction[QUAD];
  u32 valid[SAMPLE_QUADS];
#pragma unroll
  for (int r = 0; r < SAMPLE_QUADS; ++r) {
    const u32 q = (blockIdx.x * SAMPLE_QUADS + r) * THREADS + threadIdx.x;
    u64 quad = q;
    if (quads > sampled) {  // one of each stretch, so that no period of the weight meets the stride
      u32 hash = q * 2654435761u;
      hash = (hash ^ hash >> 15) * 2246822519u;
      quad = q * quads / sampled + (hash ^ hash >> 13) % (u32)(quads / sampled);
    }
    const u64 i = quad * QUAD;
    load4<KEY_KIND, false>(a.source, i, a.numel, g[r]);
    load4<0, false>(a.ema, i, a.numel, m[r]);
    load4<0, false>(a.ema_abs, i, a.numel, v[r]);
    valid[r] = inside4(i, a.numel) & ~bits4(a.bits, i, a.numel);
  }
#pragma unroll
  for (int r = 0; r < SAMPLE_QUADS; ++r) {
    const u32 marked = averages4(a, valid[r], g[r], m[r], v[r], direction);
#pragma unroll
    for (int j = 0; j < QUAD; ++j)
      if (valid[r] >> j & 1u)  // at most 4096 of a block: 16 bits are enough for each half
        atomicAdd(own + (key_of_magnitude(g[r][j]) >> FINE_SHIFT), 1u | (marked >> j & 1u) << 16);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < FINE; b += THREADS)
    if (own[b]) atomicAdd(a.fine + b, (u64)(own[b] >> 16) << 32 | (own[b] & 0xffffu));
  if (!is_last(a.state->done + 5, blocks)) return;
  bound_threshold(a, quads > sampled ? (float)((u64)sampled * QUAD) / (float)a.numel : 1.0f);
}

// -- averages --------------------------------------------------------------------------------
template <bool SELECT>
__device__ __forceinline__ void averages(const Args& a, u32* own) {
  __shared__ u32 length[2], above[2];
  State* s = a.state;
  const u32 lo = SELECT ? s->lo : 0u, width = SELECT ? s->width : 0u, hi = lo + width;
  const u32 open = 32 - __clz(width | 1u), shift = open > 11 ? open - 11 : 0;
  const u32 lane = threadIdx.x & 31;
  uint4* in_question = a.window + (u64)blockIdx.x * a.window_room;
  uint2* certain = a.sure + (u64)blockIdx.x * a.sure_room;
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
        const u32 place = (u32)(i + r * TILE + j), bits = __float_as_uint(step[r][j]);
        if (window[r] >> j & 1u) {
          const u32 key = key_of_magnitude(g[r][j]) | (marked[r] >> j & 1u);
          if (e < a.window_room) in_question[e] = make_uint4(key, place, bits, 0u);
          ++e;
        }
        if (sure[r] >> j & 1u) {
          if (f < a.sure_room) certain[f] = make_uint2(place, bits);
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
  release(s, 2);
}

// -- update ----------------------------------------------------------------------------------
#define BATCH 8  // independent loads in flight of a thread

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

// Moves the listed weights; ``read(e)`` gives an entry as index and step, and whether it is taken.
template <typename Read>
__device__ __forceinline__ void move_listed(const Args& a, u32 length, Read read) {
  for (u32 first = threadIdx.x; first < length; first += BATCH * THREADS) {
    uint2 entry[BATCH];
    float w[BATCH];
    bool take[BATCH];
#pragma unroll
    for (int k = 0; k < BATCH; ++k) {
      const u32 e = first + k * THREADS;
      take[k] = e < length && read(e, entry[k]);
    }
#pragma unroll
    for (int k = 0; k < BATCH; ++k) w[k] = take[k] ? load1(a.weight, entry[k].x) : 0.0f;
#pragma unroll
    for (int k = 0; k < BATCH; ++k)
      if (take[k]) store1(a.weight, entry[k].x, moved(a, w[k], __uint_as_float(entry[k].y)));
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

__device__ __forceinline__ void update(const Args& a) {
  const Threshold threshold(a.state);
  if (!a.state->listed) {
    move_all(a, threshold);
    return;
  }
  const u32 segment = blockIdx.x;
  const uint2* certain = a.sure + (u64)segment * a.sure_room;
  const uint4* in_question = a.window + (u64)segment * a.window_room;
  move_listed(a, a.lengths[a.segments + segment], [&](u32 e, uint2& entry) {
    entry = certain[e];
    return true;
  });
  move_listed(a, a.lengths[segment], [&](u32 e, uint2& entry) {
    const uint4 q = in_question[e];
    entry = make_uint2(q.y, q.z);
    return (q.x & 1u) && threshold.takes(q.x & ~1u, q.y);
  });
}

// -- launches --------------------------------------------------------------------------------
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_averages(Args a) {
  averages<false>(a, nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) step_fused(Args a) {
  __shared__ u32 own[FINE > 2 * BINS ? FINE : 2 * BINS];
  const State* s = a.state;
  sample(a, own);
  await(s, 1);
  averages<true>(a, own);
  await(s, 2);
  for (int pass = 1; pass < 4 && s->shift && (s->want[0] | s->want[1]); ++pass) {
    count_digits<true>(a, pass, own);
    await(s, 2 + pass);
  }
  if (s->want[0] | s->want[1]) {
    cut_ties<true>(a);
    await(s, 6);
  }
  update(a);
}
