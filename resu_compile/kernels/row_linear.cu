// Linear layer on a weight packed by rows (row_weight.py), for few rows of x.
//
// A block owns a run of rows of the weight and keeps RM rows of x in shared memory. Its groups are
// dealt to its warps in equal contiguous parts, whatever the rows. Lane l takes the groups l, 32 + l,
// ... of the part, asked for ahead, and sums them up until its row ends. Then its sums go to a place
// of their own, (row + warp, lane): while either number grows the other does not fall, so no two
// meet. In the end 8 lanes add up the places of a row, always in the same order.
//
// Column c of x lies in shared memory at 128 (c % q) + E (c / q), where E is the size of its RM
// values and q a power of two that is at least K E / 128: lanes that read columns q apart find
// different banks.
//
// Defined by the including source: X_KIND and W_KIND, the dtypes of x and of the weight (0 fp32,
// 1 fp16, 2 bf16); RM, rows of x, 1, 2, 4 or 8; RAW_ROWS, how many of them are brought at once;
// GAP_BITS, 4 or 8; WIDE_BASE, base columns of 32 bits; STAGED, x in shared memory, else it is read
// where it is; RING, each warp has slots in shared memory that bulk copies fill ahead (9.0 and up),
// else the next group is on its way to registers; MAX_THREADS.

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

struct Args {
  const void* x;       // (M, K)
  const uint4* val;    // [chunk][W_BYTES][32]
  const void* gap;     // [chunk][32] of 16 gaps
  const void* base;    // [chunk][32]
  const int* ends;     // (blocks, room)
  const int* first;    // (blocks + 1)
  const int* lead;     // (blocks, chunks): row of the run that the chunk begins with
  const void* bias;    // (N) of the dtype of x, or null
  void* y;             // (M, N)
  u32 rows, out_features, in_features;
  u32 chunks;          // of 32 groups, of a block
  u32 steps;           // chunks of a warp
  u32 inverse;         // 2**32 / steps, rounded up
  u32 room;            // rows of a block at most
  u32 log_q;
  u32 activation;      // position in ACTIVATIONS
  u32 slots;           // of a warp's ring, 0 without
  u32 ends_at, sums_at, ring_at, barriers_at;  // bytes from the start of shared memory
};

#define WARP 32
#define ALL 0xffffffffu
constexpr int X_BYTES = X_KIND == 0 ? 4 : 2;
constexpr int W_BYTES = W_KIND == 0 ? 4 : 2;
constexpr int BASE_BYTES = WIDE_BASE ? 4 : 2;
constexpr int VECTORS = W_BYTES;          // of 16 bytes, for the 16 values of a group
constexpr bool WIDE_X = X_KIND == 0 || RM == 1;  // kept as fp32 in shared memory
constexpr int CELL = RM * (WIDE_X ? 4 : 2);      // bytes of a column of x: E above
constexpr int BANKS = 128 / CELL;
constexpr u32 VAL_CHUNK = VECTORS * WARP * 16, GAP_CHUNK = WARP * 2 * GAP_BITS;  // bytes
constexpr u32 BASE_CHUNK = WARP * BASE_BYTES, SLOT = VAL_CHUNK + GAP_CHUNK + BASE_CHUNK;

__device__ __forceinline__ float from_half(u32 bits) {
  float y;
  asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(y) : "h"((u16)bits));
  return y;
}

// The lower or upper value of a pair of 16-bit values.
template <int KIND, int UPPER>
__device__ __forceinline__ float from_pair(u32 pair) {
  if (KIND == 2) return __uint_as_float(UPPER ? pair & 0xffff0000u : pair << 16);
  return from_half(UPPER ? pair >> 16 : pair);
}

// fp32 to the bits of the dtype of x (16-bit kinds).
__device__ __forceinline__ u16 to_x(float value) {
  u16 bits;
#if X_KIND == 2
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ float round_to_x(float value) {
#if X_KIND == 0
  return value;
#else
  return from_pair<X_KIND, 0>(to_x(value));
#endif
}

// A value of the weight, rounded to the dtype of x.
template <int UPPER>
__device__ __forceinline__ float weight_of(u32 pair) {
  const float value = from_pair<W_KIND, UPPER>(pair);
  return X_KIND == 0 || X_KIND == W_KIND ? value : round_to_x(value);
}

__device__ __forceinline__ float load_x(const void* x, u64 index) {
#if X_KIND == 0
  return __ldg((const float*)x + index);
#else
  return from_pair<X_KIND, 0>(__ldg((const u16*)x + index));
#endif
}

__device__ __forceinline__ u32 bits_x(const void* x, u64 index) {
#if X_KIND == 0
  return __ldg((const u32*)x + index);
#else
  return __ldg((const u16*)x + index);
#endif
}

// What a lane holds of a group before it is used.
struct Group {
  uint4 val[VECTORS];
  u32 gap[GAP_BITS / 2];
  u32 base;
};

#if RING
template <typename T>
__device__ __forceinline__ T read(const T* p) {
  return *p;
}
#else  // from memory, once
__device__ __forceinline__ uint4 read(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 read(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

template <typename T>
__device__ __forceinline__ T read(const T* p) {
  return __ldg(p);
}
#endif

// A lane's group of a chunk.
__device__ __forceinline__ void load(Group& g, const void* val, const void* gap, const void* base) {
  const u32 lane = threadIdx.x & (WARP - 1);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) g.val[v] = read((const uint4*)val + v * WARP + lane);
#if GAP_BITS == 8
  const uint4 w = read((const uint4*)gap + lane);
  g.gap[0] = w.x, g.gap[1] = w.y, g.gap[2] = w.z, g.gap[3] = w.w;
#else
  const uint2 w = read((const uint2*)gap + lane);
  g.gap[0] = w.x, g.gap[1] = w.y;
#endif
#if WIDE_BASE
  g.base = read((const u32*)base + lane);
#else
  g.base = read((const u16*)base + lane);
#endif
}

__device__ __forceinline__ void load(Group& g, const Args& a, u32 chunk) {
  load(g, (const unsigned char*)a.val + (u64)chunk * VAL_CHUNK,
       (const unsigned char*)a.gap + (u64)chunk * GAP_CHUNK,
       (const unsigned char*)a.base + (u64)chunk * BASE_CHUNK);
}

__device__ __forceinline__ u32 address(const void* p) {
  return (u32)__cvta_generic_to_shared(p);
}

#if RING
__device__ __forceinline__ void bulk(unsigned char* to, const void* from, u64 at, u32 bytes,
                                     u64* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(address(to)), "l"((const unsigned char*)from + at), "r"(bytes), "r"(address(barrier))
      : "memory");
}

// Fill a slot, by one lane; the barrier's phase ends when all is there.
__device__ __forceinline__ void request(const Args& a, unsigned char* slot, u64* barrier,
                                        u32 chunk) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)),
               "r"(SLOT) : "memory");
  bulk(slot, a.val, (u64)chunk * VAL_CHUNK, VAL_CHUNK, barrier);
  bulk(slot + VAL_CHUNK, a.gap, (u64)chunk * GAP_CHUNK, GAP_CHUNK, barrier);
  bulk(slot + VAL_CHUNK + GAP_CHUNK, a.base, (u64)chunk * BASE_CHUNK, BASE_CHUNK, barrier);
}

__device__ __forceinline__ void await(u64* barrier, u32 parity) {
  u32 done;
  do {
    asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(address(barrier)), "r"(parity)
                 : "memory");
  } while (!done);
}

#endif

// Bring the first lines of a part of the weight to L2.
__device__ __forceinline__ void prefetch(const Args& a, u32 chunk, u32 count) {
  constexpr u32 VAL_LINES = VAL_CHUNK / 128, GAP_LINES = GAP_CHUNK / 128;
  const u32 lane = threadIdx.x & (WARP - 1);
  for (u32 line = lane; line < count * (VAL_LINES + GAP_LINES + 1); line += WARP) {
    const unsigned char* p;
    if (line < count * VAL_LINES)
      p = (const unsigned char*)a.val + (u64)chunk * VAL_CHUNK + line * 128;
    else if (line < count * (VAL_LINES + GAP_LINES))
      p = (const unsigned char*)a.gap + (u64)chunk * GAP_CHUNK + (line - count * VAL_LINES) * 128;
    else
      p = (const unsigned char*)a.base +
          (u64)(chunk + line - count * (VAL_LINES + GAP_LINES)) * BASE_CHUNK;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
  }
}

__device__ __forceinline__ u32 dot4(u32 bytes, u32 factors, u32 sum) {
  u32 y;
  asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(y) : "r"(bytes), "r"(factors), "r"(sum));
  return y;
}

#if STAGED
#define UNIT 0x80u  // columns count 128 each: the distance of neighbours in shared memory
#else
#define UNIT 0x01u
#endif

// From global to shared memory, past the registers.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(
                   address(to)), "l"(from), "n"(BYTES) : "memory");
}

struct Place {
  const unsigned char* x;  // in shared memory
  const void* global;      // rows of x from the first of the tile on
  u32 shift, back;         // 7 + log_q; E - 128 q
  u32 in_features, rows;   // of the tile
};

// acc += value * x of the column at ``at`` (in UNITs).
__device__ __forceinline__ void add(float (&acc)[RM], const Place& p, u32 at, float value) {
#if STAGED
  const unsigned char* cell = p.x + (at + (at >> p.shift) * p.back);
  if (WIDE_X) {
    if (RM == 1) {
      acc[0] = fmaf(value, *(const float*)cell, acc[0]);
    } else if (RM == 2) {
      const float2 v = *(const float2*)cell;
      acc[0] = fmaf(value, v.x, acc[0]), acc[1 % RM] = fmaf(value, v.y, acc[1 % RM]);
    } else {
#pragma unroll
      for (int i = 0; i < RM / 4; ++i) {
        const float4 v = ((const float4*)cell)[i];
        const float w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int m = 0; m < 4; ++m) acc[(4 * i + m) % RM] = fmaf(value, w[m], acc[(4 * i + m) % RM]);
      }
    }
  } else {
    u32 pairs[RM < 2 ? 1 : RM / 2];
    if (RM <= 2) {
      pairs[0] = *(const u32*)cell;
    } else if (RM == 4) {
      const uint2 v = *(const uint2*)cell;
      pairs[0] = v.x, pairs[1 % (RM / 2 + 1)] = v.y;
    } else {
      const uint4 v = *(const uint4*)cell;
      const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < RM / 2; ++i) pairs[i] = w[i];
    }
#pragma unroll
    for (int m = 0; m < RM; ++m) {
      const float v = m & 1 ? from_pair<X_KIND, 1>(pairs[m / 2]) : from_pair<X_KIND, 0>(pairs[m / 2]);
      acc[m] = fmaf(value, v, acc[m]);
    }
  }
#else
#pragma unroll
  for (int m = 0; m < RM; ++m)
    if (m < p.rows) acc[m] = fmaf(value, load_x(p.global, (u64)m * p.in_features + at), acc[m]);
#endif
}

template <int J>
__device__ __forceinline__ float value_of(const Group& g) {
  constexpr int WORD = J * W_BYTES / 4, V = WORD / 4, C = WORD % 4;
  const u32 word = C == 0 ? g.val[V].x : C == 1 ? g.val[V].y : C == 2 ? g.val[V].z : g.val[V].w;
#if W_KIND == 0
  return round_to_x(__uint_as_float(word));
#else
  return weight_of<J & 1>(word);
#endif
}

// Four entries whose gaps are the bytes of a word; ``at`` moves on to the last of them.
template <int J>
__device__ __forceinline__ void add4(float (&acc)[RM], const Place& p, const Group& g, u32 gaps,
                                     u32& at) {
  add(acc, p, dot4(gaps, UNIT, at), value_of<J>(g));
  add(acc, p, dot4(gaps, UNIT * 0x101u, at), value_of<J + 1>(g));
  add(acc, p, dot4(gaps, UNIT * 0x10101u, at), value_of<J + 2>(g));
  at = dot4(gaps, UNIT * 0x1010101u, at);
  add(acc, p, at, value_of<J + 3>(g));
}

__device__ __forceinline__ void add_group(float (&acc)[RM], const Place& p, const Group& g) {
  u32 at = g.base * UNIT;
#if GAP_BITS == 8
  add4<0>(acc, p, g, g.gap[0], at);
  add4<4>(acc, p, g, g.gap[1], at);
  add4<8>(acc, p, g, g.gap[2], at);
  add4<12>(acc, p, g, g.gap[3], at);
#else
  add4<0>(acc, p, g, g.gap[0] & 0x0f0f0f0fu, at);
  add4<4>(acc, p, g, g.gap[0] >> 4 & 0x0f0f0f0fu, at);
  add4<8>(acc, p, g, g.gap[1] & 0x0f0f0f0fu, at);
  add4<12>(acc, p, g, g.gap[1] >> 4 & 0x0f0f0f0fu, at);
#endif
}

// -- x into shared memory --------------------------------------------------------------------
#if STAGED
// ROWS values of a column, from bits that stand one in each word.
template <int ROWS>
__device__ __forceinline__ void put(unsigned char* cell, const u32 (&bits)[ROWS]) {
  constexpr int WORDS = WIDE_X ? ROWS : (ROWS + 1) / 2;
  u32 words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i)
    words[i] = X_KIND == 0 ? bits[i]
               : WIDE_X    ? __float_as_uint(from_pair<X_KIND, 0>(bits[i]))
                           : bits[2 * i % ROWS] | bits[(2 * i + 1) % ROWS] << 16;
  if (WORDS == 1 && (WIDE_X || ROWS == 2)) *(u32*)cell = words[0];
  if (ROWS == 1 && !WIDE_X) *(u16*)cell = (u16)bits[0];
  if (WORDS == 2) *(uint2*)cell = make_uint2(words[0], words[1 % WORDS]);
  if (WORDS == 4)
    *(uint4*)cell = make_uint4(words[0], words[1 % WORDS], words[2 % WORDS], words[3 % WORDS]);
}

// Ask for rows of x, in pieces of what one bank will hold, 16 bytes apart so that lanes that read
// different pieces find different banks.
__device__ __forceinline__ void fetch(unsigned char* raw, const Place& p, u32 log_q, u32 m0) {
  constexpr u32 SPAN = 16 / X_BYTES;
  const u32 q = 1u << log_q, pitch = q * X_BYTES + 16, k = p.in_features;
#pragma unroll
  for (u32 m = 0; m < RAW_ROWS; ++m) {
    if (m0 + m >= p.rows) break;
    const unsigned char* row = (const unsigned char*)p.global + (u64)(m0 + m) * k * X_BYTES;
    for (u32 column = threadIdx.x * SPAN; column < k; column += blockDim.x * SPAN)
      copy_async<16>(
          raw + (m * BANKS + (column >> log_q)) * pitch + (column & (q - 1)) * X_BYTES,
          row + column * X_BYTES);
  }
}

// From the pieces to the cells; lane after lane takes another bank.
__device__ __forceinline__ void transpose(unsigned char* cells, const unsigned char* raw,
                                          const Place& p, u32 q, u32 m0) {
  constexpr u32 SPAN = 16 / X_BYTES;
  const u32 pitch = q * X_BYTES + 16;
  for (u32 task = threadIdx.x; task < BANKS * (q / SPAN); task += blockDim.x) {
    const u32 row = task / BANKS * SPAN, bank = task % BANKS;
    if (bank * q + row >= p.in_features) continue;
    u32 w[RAW_ROWS][4];
#pragma unroll
    for (u32 m = 0; m < RAW_ROWS; ++m) {
      uint4 v = make_uint4(0u, 0u, 0u, 0u);
      if (m0 + m < p.rows) v = *(const uint4*)(raw + (m * BANKS + bank) * pitch + row * X_BYTES);
      w[m][0] = v.x, w[m][1] = v.y, w[m][2] = v.z, w[m][3] = v.w;
    }
#pragma unroll
    for (u32 j = 0; j < SPAN; ++j) {
      u32 bits[RAW_ROWS];
#pragma unroll
      for (int m = 0; m < RAW_ROWS; ++m)
        bits[m] = X_BYTES == 4 ? w[m][j % 4] : w[m][j / 2 % 4] >> (j & 1) * 16 & 0xffffu;
      put<RAW_ROWS>(cells + (row + j) * 128u + bank * CELL + m0 * (CELL / RM), bits);
    }
  }
}

// The same column by column, for rows of x that do not start at multiples of 16 bytes.
__device__ __forceinline__ void stage(unsigned char* cells, const Place& p, u32 q) {
  for (u32 task = threadIdx.x; task < BANKS * q; task += blockDim.x) {
    const u32 row = task / BANKS, bank = task % BANKS, column = bank * q + row;
    if (column >= p.in_features) continue;
    u32 bits[RM];
#pragma unroll
    for (int m = 0; m < RM; ++m)
      bits[m] = m < p.rows ? bits_x(p.global, (u64)m * p.in_features + column) : 0u;
    put<RM>(cells + row * 128u + bank * CELL, bits);
  }
}
#endif

// -- partial sums ----------------------------------------------------------------------------
__device__ __forceinline__ void put_sums(float* sums, u32 place, float (&acc)[RM]) {
  if (RM == 1) {
    sums[place] = acc[0];
  } else if (RM == 2) {
    ((float2*)sums)[place] = make_float2(acc[0], acc[1 % RM]);
  } else {
#pragma unroll
    for (int i = 0; i < RM / 4; ++i)
      ((float4*)sums)[place * (RM / 4) + i] = make_float4(
          acc[4 * i], acc[(4 * i + 1) % RM], acc[(4 * i + 2) % RM], acc[(4 * i + 3) % RM]);
  }
#pragma unroll
  for (int m = 0; m < RM; ++m) acc[m] = 0.0f;
}

__device__ __forceinline__ float activate(float v, u32 activation) {
  switch (activation) {
    case 1: return v < 0.0f ? 0.0f : v;  // NaN stays
    case 2: return 0.5f * v * (1.0f + erff(v * 0.70710678f));
    case 3: return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v)));
    case 4: return v / (1.0f + expf(-v));
    default: return v;
  }
}

extern "C" __global__ void __launch_bounds__(MAX_THREADS, 1) row_linear(Args a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const u32 block = blockIdx.x, tile = blockIdx.y * RM;
  int* ends = (int*)(shared + a.ends_at);
  unsigned char* raw = shared + a.sums_at;  // x as it comes, then the partial sums
  float* sums = (float*)raw;
  const u32 own = warp * a.steps < a.chunks ? min(a.steps, a.chunks - warp * a.steps) : 0u;
  u32 chunk = block * a.chunks + warp * a.steps;
#if RING
  unsigned char* ring = shared + a.ring_at + warp * a.slots * SLOT;
  u64* barriers = (u64*)(shared + a.barriers_at) + warp * a.slots;
  if (lane < a.slots)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barriers + lane)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
#if __CUDA_ARCH__ >= 900
  // Bring the beginning of the weight nearer before the results of the kernel before are awaited;
  // it is read afterwards, since that kernel may have written it.
  prefetch(a, chunk, min(own, 2u));
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif

  // x is asked for first, or it would come behind all that is asked for of the weight
  Place place;
  place.x = shared;
  place.global = (const unsigned char*)a.x + (u64)tile * a.in_features * X_BYTES;
  place.shift = 7 + a.log_q;
  place.back = CELL - (128u << a.log_q);
  place.in_features = a.in_features;
  place.rows = min(RM, a.rows - tile);
#if STAGED
  const bool wide = a.log_q >= 3 && a.in_features * X_BYTES % 16 == 0 && (u64)a.x % 16 == 0;
  if (wide) fetch(raw, place, a.log_q, 0);
#endif
  for (u32 r = threadIdx.x; r < a.room; r += blockDim.x)
    copy_async<4>(ends + r, a.ends + block * a.room + r);
  if (threadIdx.x == 0) ends[a.room] = 0x7fffffff;
  Group now;
#if RING
  __syncwarp();
  if (lane == 0)
    for (u32 s = 0; s < min(a.slots, own); ++s) request(a, ring + s * SLOT, barriers + s, chunk + s);
#else
  Group next;
  if (own) load(now, a, chunk);
#endif
  u32 row = own ? a.lead[chunk] : a.room;
  const u32 behind = (warp + 1) * a.steps < a.chunks ? a.lead[chunk + a.steps] : a.room;
  const u32 first = a.first[block], rows = a.first[block + 1] - first;

#if STAGED
  if (wide) {
#pragma unroll
    for (int m0 = 0; m0 < RM; m0 += RAW_ROWS) {
      if (m0) fetch(raw, place, a.log_q, m0);
      asm volatile("cp.async.wait_all;" ::: "memory");
      __syncthreads();
      transpose(shared, raw, place, 1u << a.log_q, m0);
      if (m0 + RAW_ROWS < RM) __syncthreads();
    }
  } else {
    stage(shared, place, 1u << a.log_q);
  }
#endif
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

#if !RING
  if (own > 1) load(next, a, chunk + 1);
#endif
  // no sums yet in the places of this warp: from its first row to that of the next warp
  for (u32 i = (row + warp) * (WARP * RM / 4) + lane; i < (behind + warp + 1) * (WARP * RM / 4);
       i += WARP)
    ((float4*)sums)[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  __syncwarp();
  int group = warp * a.steps * WARP + lane, row_end = ends[row];
  while (group >= row_end) row_end = ends[++row];
  float acc[RM];
#pragma unroll
  for (int m = 0; m < RM; ++m) acc[m] = 0.0f;
#if RING
  u32 slot = 0, parity = 0;
#endif
  for (u32 s = 0; s < own; ++s) {
#if RING
    const unsigned char* from = ring + slot * SLOT;
    await(barriers + slot, parity);
    load(now, from, from + VAL_CHUNK, from + VAL_CHUNK + GAP_CHUNK);
    __syncwarp();
    if (lane == 0 && s + a.slots < own)
      request(a, ring + slot * SLOT, barriers + slot, chunk + s + a.slots);
    if (++slot == a.slots) slot = 0, parity ^= 1;
#else
    if (s) {
      now = next;
      if (s + 1 < own) load(next, a, chunk + s + 1);
    }
#endif
    if (group >= row_end) {
      put_sums(sums, (row + warp) * WARP + lane, acc);
      do row_end = ends[++row]; while (group >= row_end);
    }
    add_group(acc, place, now);
    group += WARP;
  }
  if (own) put_sums(sums, (row + warp) * WARP + lane, acc);
  __syncthreads();

  // 8 lanes a row, each 4 of every 32 sums
  const u32 part = a.steps * WARP, sub = lane & 7;
  for (u32 r0 = warp * 4; r0 < rows; r0 += warps * 4) {
    const u32 r = r0 + lane / 8;
    const u32 begin = r == 0 || r >= rows ? 0 : ends[r - 1], end = r < rows ? ends[r] : 0;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    // the warp of the first group: a division by steps
    u32 w = a.steps == 1 ? begin / WARP : __umulhi(begin / WARP, a.inverse);
    for (u32 from = begin; from < end; from = ++w * part) {
#pragma unroll
      for (int i = 0; i < RM; ++i) {
        const float4 t = ((const float4*)sums)[(r + w) * (WARP * RM / 4) + i * 8 + sub];
        v.x += t.x, v.y += t.y, v.z += t.z, v.w += t.w;
      }
    }
    // value e of a vector belongs to row e % RM of x; for 8 rows even lanes have 0 to 3
    if (RM == 1) v.x = v.x + v.y + (v.z + v.w);
    if (RM == 2) v.x += v.z, v.y += v.w;
#pragma unroll
    for (int d = RM == 8 ? 2 : 1; d < 8; d *= 2) {
      v.x += __shfl_xor_sync(ALL, v.x, d);
      if (RM >= 2) v.y += __shfl_xor_sync(ALL, v.y, d);
      if (RM >= 4) v.z += __shfl_xor_sync(ALL, v.z, d), v.w += __shfl_xor_sync(ALL, v.w, d);
    }
    const u32 e = RM == 8 ? sub >> 1 : sub, m = RM == 8 ? (sub & 1) * 4 + e : sub;
    float y = e == 0 ? v.x : e == 1 ? v.y : e == 2 ? v.z : v.w;
    if (r < rows && m < place.rows) {
      const u32 n = first + r;
      if (a.bias) y += load_x(a.bias, n);
      y = activate(y, a.activation);
      const u64 at = (u64)(tile + m) * a.out_features + n;
#if X_KIND == 0
      ((float*)a.y)[at] = y;
#else
      ((u16*)a.y)[at] = to_x(y);
#endif
    }
  }
}
