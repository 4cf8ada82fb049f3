// Exact k-th largest value by radix histograms, and what follows from it: masks and ties.
//
// A value becomes a 32-bit key whose unsigned order is the order of the values. Each pass counts
// one digit of the keys that agree with the digits found so far; the last block of the pass turns
// the counts into the next digit. Two ranks are looked for at once: the want[0]-th among all valid
// places and the want[1]-th among the marked ones; the higher of the two keys is the threshold, so
// the lower is dropped as soon as the digits differ. Nothing returns to the host. Counts are 32
// bits: below 2**32 elements.
//
// The including source defines KEY_KIND: 0 float, 1 bfloat16, 2 half.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 512
#define QUAD 4                 // consecutive elements of a thread: one 16-byte access of floats
#define TILE (THREADS * QUAD)  // elements of a block in one go
#define BINS 2048
#define CHUNKS 2048            // at most, of the search among ties; four for each thread
#define FINE 8192              // bins of the sample: exponent and 5 bits of the mantissa
#define NONE 0xffffffffu       // no digit
#define ALL 0xffffffffu        // every bit, every lane

struct State {  // zeroed before the first pass
  u64 cut;      // with a want left over: the last index taken of the keys equal to the threshold
  u32 prefix;   // the digits found so far of threshold - lo
  u32 want[2];  // rank among the keys that agree with the prefix; 0: does not limit any more
  u32 shift;    // low bits of threshold - lo that are not found yet
  u32 lo;       // only keys in [lo, lo + width] are still in question
  u32 width;
  u32 listed;    // those keys are in the lists of the step
  u32 overflow;  // a list was too short
  u32 above[2];  // keys above lo + width, of valid and of marked places
  u32 phase;     // last phase of a fused launch that all blocks have finished
  u32 done[8];   // blocks that finished, a counter for each pass
};

struct Args {  // mirrored by _radix_cuda.CudaArgs
  void* weight;
  const void* source;  // gradient, or score: what the keys are made of
  float* ema;
  float* ema_abs;
  const u8* bits;  // 0: valid place; null: all are
  u8* marked;      // 1: marked place, a subset of the valid ones
  u32* hist;       // [4][2][BINS], zeroed; all valid places are [0] + [1]
  u64* fine;       // [FINE], zeroed; the same of the sample: all in the low half, marked in the high
  State* state;
  u32* counts;   // [2][CHUNKS]
  u32* lengths;  // [2][segments]: entries in each segment of the lists
  uint4* window;  // [segments][window_room]: keys in question, with the mark in bit 0; index, step
  uint2* sure;    // [segments][sure_room]: marked keys above those in question; index, step
  u8* mask;
  u64 numel;
  u64 chunk;  // elements, a multiple of TILE
  u32 want[2];
  u32 segments, window_room, sure_room;  // segments: blocks of the passes that count
  u32 adaptive;
  float lr, beta, rest, delta, tau, decay;  // rest = 1 - beta
};

// -- loads -----------------------------------------------------------------------------------
template <int KIND>
__device__ __forceinline__ float widen(unsigned short x) {
  if (KIND == 1) return __uint_as_float((u32)x << 16);
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

template <int KIND>
__device__ __forceinline__ unsigned short narrow(float x) {  // to nearest, ties to even
  unsigned short y;
  if (KIND == 1)
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Elements i .. i + 3; those from numel on are 0.
template <int KIND, bool STREAM>
__device__ __forceinline__ void load4(const void* base, u64 i, u64 numel, float x[QUAD]) {
  if (KIND == 0) {
    const float* p = (const float*)base + i;
    if (i + QUAD <= numel) {
      float4 q = STREAM ? __ldcs((const float4*)p) : *(const float4*)p;
      x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
    } else {
      for (int j = 0; j < QUAD; ++j) x[j] = i + j < numel ? p[j] : 0.0f;
    }
  } else {
    const unsigned short* p = (const unsigned short*)base + i;
    if (i + QUAD <= numel) {
      ushort4 q = STREAM ? __ldcs((const ushort4*)p) : *(const ushort4*)p;
      x[0] = widen<KIND>(q.x), x[1] = widen<KIND>(q.y);
      x[2] = widen<KIND>(q.z), x[3] = widen<KIND>(q.w);
    } else {
      for (int j = 0; j < QUAD; ++j) x[j] = i + j < numel ? widen<KIND>(p[j]) : 0.0f;
    }
  }
}

template <int KIND>
__device__ __forceinline__ void store4(void* base, u64 i, u64 numel, const float x[QUAD]) {
  if (KIND == 0) {
    float* p = (float*)base + i;
    if (i + QUAD <= numel) {
      __stcs((float4*)p, make_float4(x[0], x[1], x[2], x[3]));
    } else {
      for (int j = 0; j < QUAD; ++j)
        if (i + j < numel) p[j] = x[j];
    }
  } else {
    unsigned short* p = (unsigned short*)base + i;
    if (i + QUAD <= numel) {
      ushort4 q;
      q.x = narrow<KIND>(x[0]), q.y = narrow<KIND>(x[1]);
      q.z = narrow<KIND>(x[2]), q.w = narrow<KIND>(x[3]);
      __stcs((ushort4*)p, q);
    } else {
      for (int j = 0; j < QUAD; ++j)
        if (i + j < numel) p[j] = narrow<KIND>(x[j]);
    }
  }
}

__device__ __forceinline__ u32 inside4(u64 i, u64 numel) {
  if (i + QUAD <= numel) return 0xfu;
  return i < numel ? (1u << (numel - i)) - 1u : 0u;
}

// i is a multiple of 4: four places are one half of a byte
__device__ __forceinline__ u32 bits4(const u8* bits, u64 i, u64 numel) {
  return i < numel ? (u32)(bits[i >> 3] >> (i & 4)) & 0xfu : 0u;
}

__device__ __forceinline__ u32 key_of_magnitude(float x) { return __float_as_uint(x) << 1; }

__device__ __forceinline__ u32 key_of_score(float x) {
  u32 u = __float_as_uint(x);
  if (u == 0x80000000u) u = 0u;  // -0 ties with +0
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// Keys of elements i .. i + 3, and which of them are valid and marked.
template <bool STEP>
__device__ __forceinline__ void keys4(const Args& a, u64 i, u32 key[QUAD], u32& valid,
                                      u32& marked) {
  float x[QUAD];
  load4<KEY_KIND, false>(a.source, i, a.numel, x);
  valid = inside4(i, a.numel);
  marked = 0u;
  if (STEP) {
    valid &= ~bits4(a.bits, i, a.numel);
    marked = bits4(a.marked, i, a.numel);
  }
#pragma unroll
  for (int j = 0; j < QUAD; ++j) key[j] = STEP ? key_of_magnitude(x[j]) : key_of_score(x[j]);
}

// -- block-wide helpers ----------------------------------------------------------------------
// Inclusive sum over the threads of the block, and the whole.
__device__ __forceinline__ u32 block_scan(u32 x, u32& total) {
  __shared__ u32 sums[THREADS / 32];
  u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    u32 y = __shfl_up_sync(NONE, x, d);
    if (lane >= d) x += y;
  }
  __syncthreads();  // sums may still be read from the call before
  if (lane == 31) sums[warp] = x;
  __syncthreads();
  u32 before = 0;
  total = 0;
#pragma unroll
  for (u32 w = 0; w < THREADS / 32; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before + x;
}

__device__ __forceinline__ void clear(u32* hist) {
  for (int b = threadIdx.x; b < 2 * BINS; b += THREADS) hist[b] = 0u;
  __syncthreads();
}

// Whether this block is the last of ``blocks`` to get here; it then sees what all others wrote.
__device__ __forceinline__ bool is_last(u32* done, u32 blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(done, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Thread 0 of the last block of a phase: what it wrote before is for all to read.
__device__ __forceinline__ void release(State* s, u32 phase) {
  __threadfence();
  atomicExch(&s->phase, phase);
}

// In a fused launch, where all blocks run at once: until the last block has released the phase.
__device__ __forceinline__ void await(const State* s, u32 phase) {
  __syncthreads();
  if (threadIdx.x == 0) {
    while (*(volatile const u32*)&s->phase < phase) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

// Finds the digit at ``shift`` from the counts of all blocks; whether a rank falls in these bins is
// known to thread 0.
__device__ bool pick(const u32* hist, const u32 want[2], u32 shift, State* s) {
  __shared__ u32 found[2][3];  // digit, keys above it, keys in its bin
  for (int c = 0; c < 2; ++c) {
    if (threadIdx.x == 0) found[c][0] = NONE;
    u32 h[4], sum = 0;  // four bins, from the top
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 bin = BINS - 1 - (4 * threadIdx.x + j);
      h[j] = __ldcg(hist + BINS + bin);
      if (c == 0) h[j] += __ldcg(hist + bin);
      sum += h[j];
    }
    u32 total, above = block_scan(sum, total) - sum;
    if (want[c] && above < want[c] && want[c] - above <= sum) {
      for (int j = 0; j < 4; ++j) {
        if (want[c] - above <= h[j]) {
          found[c][0] = BINS - 1 - (4 * threadIdx.x + j);
          found[c][1] = above;
          found[c][2] = h[j];
          break;
        }
        above += h[j];
      }
    }
  }
  __syncthreads();
  if (threadIdx.x != 0) return false;
  // a rank that nothing has reached (fewer places than wanted) limits nothing
  u32 digit = 0;
  for (int c = 0; c < 2; ++c)
    if (found[c][0] != NONE && found[c][0] > digit) digit = found[c][0];
  for (int c = 0; c < 2; ++c) {
    u32 left = found[c][0] == digit ? want[c] - found[c][1] : 0u;
    s->want[c] = left == found[c][2] ? 0u : left;  // all of the bin are taken: the prefix decides
  }
  s->prefix |= digit << shift;
  s->shift = shift;
  return found[0][0] != NONE || found[1][0] != NONE;
}

// Adds the block's counts to the grid's; whether this block is the last to do so.
__device__ __forceinline__ bool add_counts(const u32* own, u32* hist, u32* done) {
  __syncthreads();
  for (int b = threadIdx.x; b < 2 * BINS; b += THREADS)
    if (own[b]) atomicAdd(hist + b, own[b]);
  return is_last(done, gridDim.x);
}

// -- passes ----------------------------------------------------------------------------------
// The next digit of at most 11 bits.
template <bool STEP>
__device__ __forceinline__ void count_digits(const Args& a, int pass, u32* own) {
  State* s = a.state;
  const bool first = !STEP && pass == 0;  // the step begins in step_averages
  u32 want[2] = {first ? a.want[0] : s->want[0], first ? a.want[1] : s->want[1]};
  const u32 open = first ? 32 : s->shift;
  if (!(want[0] | want[1]) || !open) return;  // settled
  const u32 lo = s->lo, width = first ? ALL : s->width, prefix = s->prefix;
  const u32 digit_bits = open < 11 ? open : 11, shift = open - digit_bits;
  const u32 digit_mask = (1u << digit_bits) - 1u;
  const u32 above = open == 32 ? 0u : ALL << open;  // digits already found
  clear(own);
  auto count = [&](u32 key, u32 marked) {
    const u32 x = key - lo;
    if (x <= width && !((x ^ prefix) & above))
      atomicAdd(own + marked * BINS + (x >> shift & digit_mask), 1u);
  };
  if (STEP && s->listed) {
    const u32 length = a.lengths[blockIdx.x];
    const uint4* entries = a.window + (u64)blockIdx.x * a.window_room;
    for (u32 e = threadIdx.x; e < length; e += THREADS)
      count(entries[e].x & ~1u, entries[e].x & 1u);
  } else {
    const u64 tiles = (a.numel + 2 * TILE - 1) / (2 * TILE);
    for (u64 t = blockIdx.x; t < tiles; t += gridDim.x) {
      // every second pass runs backwards: what the pass before read last is still in L2
      const u64 i = (pass & 1 ? tiles - 1 - t : t) * (2 * TILE) + threadIdx.x * QUAD;
      u32 key[2][QUAD], valid[2], marked[2];
      keys4<STEP>(a, i, key[0], valid[0], marked[0]);
      keys4<STEP>(a, i + TILE, key[1], valid[1], marked[1]);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int j = 0; j < QUAD; ++j)
          if (valid[r] >> j & 1u) count(key[r][j], marked[r] >> j & 1u);
    }
  }
  u32* hist = a.hist + pass * 2 * BINS;
  if (!add_counts(own, hist, s->done + pass)) return;
  pick(hist, want, shift, s);
  if (threadIdx.x == 0) {
    s->width = width;
    release(s, 2 + pass);
  }
}

// Where fewer than all of the keys equal to the threshold are taken: the last index taken.
template <bool STEP>
__device__ __forceinline__ void cut_ties(const Args& a) {
  __shared__ u32 ties[2];
  __shared__ u32 place[2];  // chunk, and rank inside it
  __shared__ u64 cut;
  State* s = a.state;
  const u32 want[2] = {s->want[0], s->want[1]}, threshold = s->lo + s->prefix;
  if (!(want[0] | want[1])) return;
  const u32 chunks = (a.numel + a.chunk - 1) / a.chunk;
  for (u32 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    if (threadIdx.x < 2) ties[threadIdx.x] = 0u;
    __syncthreads();
    u32 all = 0, some = 0;
    for (u64 t = 0; t < a.chunk; t += TILE) {
      u32 key[QUAD], valid, marked;
      keys4<STEP>(a, chunk * a.chunk + t + threadIdx.x * QUAD, key, valid, marked);
#pragma unroll
      for (int j = 0; j < QUAD; ++j) {
        u32 hit = (valid >> j & 1u) && key[j] == threshold;
        all += hit;
        some += hit & (marked >> j);
      }
    }
    if (all) atomicAdd(ties, all);
    if (some) atomicAdd(ties + 1, some);
    __syncthreads();
    if (threadIdx.x < 2) a.counts[threadIdx.x * CHUNKS + chunk] = ties[threadIdx.x];
  }
  if (!is_last(s->done + 4, gridDim.x)) return;

  u64 least = ~0ull;
  for (int c = 0; c < 2; ++c) {
    if (!want[c]) continue;
    u32 h[4], sum = 0;
    for (int j = 0; j < 4; ++j) {
      u32 chunk = 4 * threadIdx.x + j;
      h[j] = chunk < chunks ? __ldcg(a.counts + c * CHUNKS + chunk) : 0u;
      sum += h[j];
    }
    u32 total, before = block_scan(sum, total) - sum;
    if (before < want[c] && want[c] - before <= sum) {
      for (int j = 0; j < 4; ++j) {
        if (want[c] - before <= h[j]) {
          place[0] = 4 * threadIdx.x + j;
          place[1] = want[c] - before;
          break;
        }
        before += h[j];
      }
    }
    __syncthreads();
    const u32 rank = place[1];
    u32 base = 0;
    for (u64 t = 0; t < a.chunk && base < rank; t += TILE) {
      const u64 i = place[0] * a.chunk + t + threadIdx.x * QUAD;
      u32 key[QUAD], valid, marked, hits = 0;
      keys4<STEP>(a, i, key, valid, marked);
      if (c == 1) valid &= marked;
      for (int j = 0; j < QUAD; ++j) hits += (valid >> j & 1u) && key[j] == threshold;
      u32 seen = base + block_scan(hits, total) - hits;
      for (int j = 0; j < QUAD; ++j)
        if ((valid >> j & 1u) && key[j] == threshold && ++seen == rank) cut = i + j;
      base += total;
    }
    __syncthreads();
    least = cut < least ? cut : least;
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    s->cut = least;
    release(s, 6);
  }
}

// Places at or above the threshold, ties up to the cut.
struct Threshold {
  u32 key;
  u64 cut;
  __device__ __forceinline__ explicit Threshold(const State* s)
      : key(s->lo + s->prefix), cut(s->want[0] | s->want[1] ? s->cut : ~0ull) {}
  __device__ __forceinline__ bool takes(u32 k, u64 i) const {
    return k > key || (k == key && i <= cut);
  }
};

#if MODULE == 0  // top-k mask of a score
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) topk_digit0(Args a) {
  __shared__ u32 own[2 * BINS];
  count_digits<false>(a, 0, own);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) topk_digit1(Args a) {
  __shared__ u32 own[2 * BINS];
  count_digits<false>(a, 1, own);
}
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) topk_digit2(Args a) {
  __shared__ u32 own[2 * BINS];
  count_digits<false>(a, 2, own);
}
extern "C" __global__ void __launch_bounds__(THREADS) topk_ties(Args a) { cut_ties<false>(a); }

extern "C" __global__ void __launch_bounds__(THREADS) topk_write(Args a) {
  const Threshold threshold(a.state);
  const u64 i = ((u64)blockIdx.x * THREADS + threadIdx.x) * QUAD;
  u32 key[QUAD], valid, marked;
  keys4<false>(a, i, key, valid, marked);
  u32 bytes = 0;
#pragma unroll
  for (int j = 0; j < QUAD; ++j) bytes |= (u32)threshold.takes(key[j], i + j) << (8 * j);
  if (i + QUAD <= a.numel) {
    *(u32*)(a.mask + i) = bytes;
  } else {
    for (int j = 0; j < QUAD; ++j)
      if (i + j < a.numel) a.mask[i + j] = bytes >> (8 * j) & 1u;
  }
}
#endif
