// Linear layer on a weight packed by rows (row_weight.py), for few rows of x.
//
// A block owns a run of rows of the weight and keeps RM rows of x in shared memory. Its groups are
// dealt to its warps in equal contiguous parts, whatever the rows: lane l of a warp takes the groups
// l, 32 + l, ... of the part and sums them up until its row ends. Then its sums go to a place in
// shared memory of their own, (row + warp, lane): while either number grows the other does not
// fall, so no two meet. In the end 8 lanes add up the places of a row, always in the same order.
//
// Column c of x lies in shared memory at 128 (c % q) + E (c / q), where E is the size of its RM
// values and q a power of two that is at least K E / 128: lanes that read columns q apart find
// different banks.
//
// Defined by the including source: X_KIND and W_KIND, the dtypes of x and of the weight (0 fp32,
// 1 fp16, 2 bf16); RM, rows of x, 1, 2, 4 or 8; GAP_BITS, 4 or 8; WIDE_BASE, base columns of 32
// bits; STAGED, x in shared memory, else it is read where it is; MAX_THREADS.

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
  const void* bias;    // (N) of the dtype of x, or null
  void* y;             // (M, N)
  u32 rows, out_features, in_features;
  u32 chunks;          // of 32 groups, of a block
  u32 steps;           // chunks of a warp
  u32 inverse;         // 2**32 / steps, rounded up
  u32 room;            // rows of a block at most
  u32 log_q;
  u32 activation;      // position in ACTIVATIONS
};

#define WARP 32
#define ALL 0xffffffffu
constexpr int X_BYTES = X_KIND == 0 ? 4 : 2;
constexpr int W_BYTES = W_KIND == 0 ? 4 : 2;
constexpr int BASE_BYTES = WIDE_BASE ? 4 : 2;
constexpr int DEPTH = 2;                  // groups of a lane on their way
constexpr int VECTORS = W_BYTES;          // of 16 bytes, for the 16 values of a group
constexpr bool WIDE_X = X_KIND == 0 || RM == 1;  // kept as fp32 in shared memory
constexpr int CELL = RM * (WIDE_X ? 4 : 2);      // bytes of a column of x: E above
constexpr int BANKS = 128 / CELL;
constexpr int STRIDE = RM <= 2 ? 40 : 32;  // places of a row and warp: 4 rows in different banks

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

__device__ __forceinline__ uint4 stream16(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

__device__ __forceinline__ void load(Group& g, const Args& a, u32 chunk) {
  const u32 lane = threadIdx.x & (WARP - 1);
#pragma unroll
  for (int v = 0; v < VECTORS; ++v)
    g.val[v] = stream16(a.val + ((u64)chunk * VECTORS + v) * WARP + lane);
  const u64 group = (u64)chunk * WARP + lane;
#if GAP_BITS == 8
  const uint4 gap = stream16((const uint4*)a.gap + group);
  g.gap[0] = gap.x, g.gap[1] = gap.y, g.gap[2] = gap.z, g.gap[3] = gap.w;
#else
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
               : "=r"(g.gap[0]), "=r"(g.gap[1]) : "l"((const uint2*)a.gap + group));
#endif
#if WIDE_BASE
  g.base = __ldg((const u32*)a.base + group);
#else
  g.base = __ldg((const u16*)a.base + group);
#endif
}

__device__ __forceinline__ void prefetch(const void* p, u32 bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes));
}

__device__ __forceinline__ void clear(Group& g) {
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) g.val[v] = make_uint4(0u, 0u, 0u, 0u);
#pragma unroll
  for (int v = 0; v < GAP_BITS / 2; ++v) g.gap[v] = 0u;
  g.base = 0u;
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
                   (u32)__cvta_generic_to_shared(to)), "l"(from), "n"(BYTES) : "memory");
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
__device__ __forceinline__ void put(unsigned char* cell, const u32 (&bits)[RM]) {
  u32 words[CELL / 4];
  if (WIDE_X) {
#pragma unroll
    for (int m = 0; m < RM; ++m)
      words[m % (CELL / 4)] = X_KIND == 0 ? bits[m] : __float_as_uint(from_pair<X_KIND, 0>(bits[m]));
  } else {
#pragma unroll
    for (int m = 0; m < RM / 2; ++m)
      words[m % (CELL / 4)] = bits[2 * m] | bits[(2 * m + 1) % RM] << 16;
  }
  if (CELL == 4) *(u32*)cell = words[0];
  if (CELL == 8) *(uint2*)cell = make_uint2(words[0], words[1 % (CELL / 4)]);
#pragma unroll
  for (int i = 0; i < CELL / 16; ++i)
    ((uint4*)cell)[i] = make_uint4(words[4 * i], words[(4 * i + 1) % (CELL / 4)],
                                   words[(4 * i + 2) % (CELL / 4)], words[(4 * i + 3) % (CELL / 4)]);
}

#if STAGED
// Ask for the rows of x, in pieces of what one bank will hold, 16 bytes apart so that lanes that
// read different pieces find different banks.
__device__ __forceinline__ void fetch(unsigned char* raw, const Place& p, u32 log_q) {
  constexpr u32 SPAN = 16 / X_BYTES;
  const u32 q = 1u << log_q, pitch = q * X_BYTES + 16, k = p.in_features;
#pragma unroll
  for (int m = 0; m < RM; ++m) {
    if (m >= p.rows) break;
    for (u32 column = threadIdx.x * SPAN; column < k; column += blockDim.x * SPAN) {
      unsigned char* to = raw + (m * BANKS + (column >> log_q)) * pitch + (column & (q - 1)) * X_BYTES;
      copy_async<16>(to, (const unsigned char*)p.global + ((u64)m * k + column) * X_BYTES);
    }
  }
}

// From the pieces to the cells; lane after lane takes another bank.
__device__ __forceinline__ void transpose(unsigned char* shared, const unsigned char* raw,
                                          const Place& p, u32 q) {
  constexpr u32 SPAN = 16 / X_BYTES;
  const u32 pitch = q * X_BYTES + 16;
  for (u32 task = threadIdx.x; task < BANKS * (q / SPAN); task += blockDim.x) {
    const u32 row = task / BANKS * SPAN, bank = task % BANKS;
    if (bank * q + row >= p.in_features) continue;
    uint4 v[RM];
#pragma unroll
    for (int m = 0; m < RM; ++m) {
      v[m] = make_uint4(0u, 0u, 0u, 0u);
      if (m < p.rows) v[m] = *(const uint4*)(raw + (m * BANKS + bank) * pitch + row * X_BYTES);
    }
#pragma unroll
    for (int j = 0; j < SPAN; ++j) {
      u32 bits[RM];
#pragma unroll
      for (int m = 0; m < RM; ++m) {
        const u32 w[4] = {v[m].x, v[m].y, v[m].z, v[m].w};
        bits[m] = X_BYTES == 4 ? w[j % 4] : w[j / 2 % 4] >> (j & 1) * 16 & 0xffffu;
      }
      put(shared + (row + j) * 128u + bank * CELL, bits);
    }
  }
}

// The same column by column, for rows of x that do not start at multiples of 16 bytes.
__device__ __forceinline__ void stage(unsigned char* shared, const Place& p, u32 q) {
  for (u32 task = threadIdx.x; task < BANKS * q; task += blockDim.x) {
    const u32 row = task / BANKS, bank = task % BANKS, column = bank * q + row;
    if (column >= p.in_features) continue;
    u32 bits[RM];
#pragma unroll
    for (int m = 0; m < RM; ++m)
      bits[m] = m < p.rows ? bits_x(p.global, (u64)m * p.in_features + column) : 0u;
    put(shared + row * 128u + bank * CELL, bits);
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

__device__ __forceinline__ void add_sums(float (&acc)[RM], const float* sums, u32 place) {
  if (RM == 1) {
    acc[0] += sums[place];
  } else if (RM == 2) {
    const float2 v = ((const float2*)sums)[place];
    acc[0] += v.x, acc[1 % RM] += v.y;
  } else {
#pragma unroll
    for (int i = 0; i < RM / 4; ++i) {
      const float4 v = ((const float4*)sums)[place * (RM / 4) + i];
      acc[4 * i] += v.x, acc[(4 * i + 1) % RM] += v.y;
      acc[(4 * i + 2) % RM] += v.z, acc[(4 * i + 3) % RM] += v.w;
    }
  }
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

extern "C" __global__ void __launch_bounds__(MAX_THREADS) row_linear(Args a) {
  extern __shared__ __align__(128) unsigned char shared[];
  const u32 lane = threadIdx.x & (WARP - 1), warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const u32 block = blockIdx.x;
  const u32 x_bytes = STAGED ? 128u << a.log_q : 0u;
  int* ends = (int*)(shared + x_bytes);
  unsigned char* raw = shared + x_bytes + (a.room * 4 / 128 + 1) * 128;  // of x as it comes, then
  float* sums = (float*)raw;                                             // partial sums

#if __CUDA_ARCH__ >= 900
  // Bring the beginning of the weight nearer before the results of the kernel before are awaited;
  // it is read afterwards, since that kernel may have written it.
  if (lane == 0 && warp * a.steps < a.chunks) {
    const u64 begin = block * a.chunks + warp * a.steps;
    const u32 count = min(2u, min(a.steps, a.chunks - warp * a.steps)) * WARP;
    prefetch((const unsigned char*)a.val + begin * (VECTORS * WARP * 16), count * VECTORS * 16);
    prefetch((const unsigned char*)a.gap + begin * (WARP * 2 * GAP_BITS), count * 2 * GAP_BITS);
    prefetch((const unsigned char*)a.base + begin * (WARP * BASE_BYTES), count * BASE_BYTES);
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif

  // x first, or it would come behind all that is asked for of the weight
  Place place;
  const u32 tile = blockIdx.y * RM;
  place.x = shared;
  place.global = (const unsigned char*)a.x + (u64)tile * a.in_features * X_BYTES;
  place.shift = 7 + a.log_q;
  place.back = CELL - (128u << a.log_q);
  place.in_features = a.in_features;
  place.rows = min(RM, a.rows - tile);
  const bool wide = a.log_q >= 3 && a.in_features * X_BYTES % 16 == 0 && (u64)a.x % 16 == 0;
#if STAGED
  if (wide) fetch(raw, place, a.log_q);
#endif
  for (u32 r = threadIdx.x; r < a.room; r += blockDim.x)
    copy_async<4>(ends + r, a.ends + block * a.room + r);
  if (threadIdx.x == 0) ends[a.room] = 0x7fffffff;

  u32 chunk = block * a.chunks + warp * a.steps;
  const u32 own_end = min(chunk + a.steps, (block + 1) * a.chunks);
  Group buffer[DEPTH];
#pragma unroll
  for (int d = 0; d < DEPTH; ++d)
    if (chunk + d < own_end) load(buffer[d], a, chunk + d); else clear(buffer[d]);
  const u32 first = a.first[block], rows = a.first[block + 1] - first;

  asm volatile("cp.async.wait_all;" ::: "memory");
#if STAGED
  if (wide) {
    __syncthreads();
    transpose(shared, raw, place, 1u << a.log_q);
  } else {
    stage(shared, place, 1u << a.log_q);
  }
#endif
  __syncthreads();

  // the row of the lane's first group: the first that ends after it
  int group = warp * a.steps * WARP;
  u32 row = 0;
  for (u32 r = lane; r < a.room; r += WARP) row += ends[r] <= group;
  row = __reduce_add_sync(ALL, row);
  group += lane;
  int row_end = ends[row];
  while (group >= row_end) row_end = ends[++row];
  float acc[RM];
#pragma unroll
  for (int m = 0; m < RM; ++m) acc[m] = 0.0f;
  for (; chunk < own_end; chunk += DEPTH) {
#pragma unroll
    for (int d = 0; d < DEPTH; ++d) {
      if (d && chunk + d >= own_end) break;
      if (group >= row_end) {
        put_sums(sums, (row + warp) * STRIDE + lane, acc);
        do row_end = ends[++row]; while (group >= row_end);
      }
      add_group(acc, place, buffer[d]);
      if (chunk + d + DEPTH < own_end) load(buffer[d], a, chunk + d + DEPTH);
      group += WARP;
    }
  }
  put_sums(sums, (row + warp) * STRIDE + lane, acc);
  __syncthreads();

  // 8 lanes a row
  const u32 part = a.steps * WARP, sub = lane & 7;
  for (u32 r0 = warp * 4; r0 < rows; r0 += warps * 4) {
    const u32 r = r0 + lane / 8;
    const u32 begin = r == 0 || r >= rows ? 0 : ends[r - 1], end = r < rows ? ends[r] : 0;
#pragma unroll
    for (int m = 0; m < RM; ++m) acc[m] = 0.0f;
    // the warp of the first group: a division by steps
    u32 w = a.steps == 1 ? begin / WARP : __umulhi(begin / WARP, a.inverse);
    for (u32 from = begin; from < end; from = ++w * part) {
      const u32 count = min(end, (w + 1) * part) - from;
#pragma unroll
      for (u32 l = sub; l < WARP; l += 8)
        if (((l - from) & (WARP - 1)) < count) add_sums(acc, sums, (r + w) * STRIDE + l);
    }
    float own = 0.0f;
#pragma unroll
    for (int m = 0; m < RM; ++m) {
#pragma unroll
      for (int s = 1; s < 8; s *= 2) acc[m] += __shfl_xor_sync(ALL, acc[m], s);
      if (m == sub) own = acc[m];
    }
    if (r < rows && sub < place.rows) {
      const u32 n = first + r;
      if (a.bias) own += load_x(a.bias, n);
      own = activate(own, a.activation);
      const u64 at = (u64)(tile + sub) * a.out_features + n;
#if X_KIND == 0
      ((float*)a.y)[at] = own;
#else
      ((u16*)a.y)[at] = to_x(own);
#endif
    }
  }
}
