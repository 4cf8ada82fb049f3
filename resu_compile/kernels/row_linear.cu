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
// Follows row_group.cu. Defined by the including source: X_KIND and W_KIND, the dtypes of x and of
// the weight (0 fp32, 1 fp16, 2 bf16); RM, rows of x, 1, 2, 4 or 8; RAW_ROWS, how many of them are
// brought at once; GAP_BITS, 4 or 8; WIDE_BASE, base columns of 32 bits; STAGED, x in shared memory,
// else it is read where it is; MAX_THREADS.
//
// A lane has one group at hand and the next on its way to registers. Rings in shared memory that
// bulk copies fill further ahead were not faster: with x of one row in bf16, weight 14336 x 4096 at
// 90, 70 and 50 % sparsity, 10.2, 17.5 and 25.3 us against 8.9, 16.2 and 23.6 (H200); with 8 rows
// of x the same.

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
  Group now, next;
  if (own) load(now, a, chunk);
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

  if (own > 1) load(next, a, chunk + 1);
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
  for (u32 s = 0; s < own; ++s) {
    if (s) {
      now = next;
      if (s + 1 < own) load(next, a, chunk + s + 1);
    }
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
