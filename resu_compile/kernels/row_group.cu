// The weight of row_linear.cu: reading groups of 16 entries (row_weight.py) and multiplying them with
// x. Comes before row_linear.cu, which says what is defined by the including source.

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
  u32 ends_at, sums_at;  // bytes from the start of shared memory
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
constexpr u32 BASE_CHUNK = WARP * BASE_BYTES;

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

// Read what is needed once.
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

// A lane's group of a chunk.
__device__ __forceinline__ void load(Group& g, const Args& a, u32 chunk) {
  const u32 lane = threadIdx.x & (WARP - 1);
  const unsigned char* val = (const unsigned char*)a.val + (u64)chunk * VAL_CHUNK;
  const unsigned char* gap = (const unsigned char*)a.gap + (u64)chunk * GAP_CHUNK;
  const unsigned char* base = (const unsigned char*)a.base + (u64)chunk * BASE_CHUNK;
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
  const u32 address = (u32)__cvta_generic_to_shared(to);
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(address), "l"(from), "n"(BYTES)
               : "memory");
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
