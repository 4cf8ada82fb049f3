// y = act(x W^T + bias) on the format of tile_weight.py. A warp decodes a strip of 16 rows straight
// into the registers that wgmma takes as its left operand; x lies in shared memory, so that a place
// of the weight costs the same at every number of rows of x.
//
// A block is GROUPS warpgroups, each with 64 rows of W; the blocks of a cluster share these rows
// and split the segments of K. Each warp copies whole segments of its strip (flags and streams) to
// its own slots in shared memory with the bulk copy engine; x comes in stages of STAGE columns.
// Partial sums meet through the shared memory of the cluster, in a fixed order.
//
// Defined by the caller: TILE_M rows of x (8, 16, 32, 64), GROUPS, UNIT, SEGMENT, STAGE, STAGES,
// SPLITS blocks of a cluster, BLOCKS_PER_SM, KIND (1 bfloat16, 2 float16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define THREADS (GROUPS * 128)
#define WORDS (SEGMENT / 64 / UNIT)  // flag words of a lane in a segment
#define STAGE_BYTES (TILE_M * STAGE * 2)
#define RED_STRIDE 68  // floats: 64 rows, and 4 so that a warp's stores meet 32 banks
#define CHUNKS (TILE_M * STAGE / 8)  // 16-byte pieces of x in a stage

struct Args {
  const u32 *flags;
  const int *offset;
  const u16 *val;
  const u16 *x;
  const u16 *bias;
  u16 *y;
  int rows, out_features, in_features, x_stride;
  int segments, strips, slots, slot_rows, activation, x_aligned, one;
};

// -- plumbing -------------------------------------------------------------------------------
__device__ __forceinline__ u32 shared_address(const void *p) {
  return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 bar) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(bar) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 bar, u32 phase) {
  asm volatile(
      "{\n .reg .pred done;\n"
      "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      " @!done bra again;\n}\n" ::"r"(bar),
      "r"(phase)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar, u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

template <int PENDING> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <int PENDING> __device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

__device__ __forceinline__ float value_of(u16 bits) {
#if KIND == 1
  return __uint_as_float((u32)bits << 16);
#else
  float f;
  asm("{ .reg .b16 h; mov.b16 h, %1; cvt.f32.f16 %0, h; }" : "=f"(f) : "h"(bits));
  return f;
#endif
}

__device__ __forceinline__ u16 rounded(float value) {
  u16 bits;
#if KIND == 1
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
  return bits;
}

__device__ __forceinline__ float activated(float v, int activation) {  // order of ACTIVATIONS
  switch (activation) {
    case 1: return v < 0.f ? 0.f : v;  // NaN stays
    case 2: return 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
    case 3: return 0.5f * v * (1.f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case 4: return v / (1.f + expf(-v));
  }
  return v;
}

// -- wgmma: D (64 x TILE_M) += A (64 x 16, registers) B (16 x TILE_M, shared memory) --------------
#if KIND == 1
#define MMA_TYPES ".f32.bf16.bf16 "
#else
#define MMA_TYPES ".f32.f16.f16 "
#endif
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)

__device__ __forceinline__ void multiply(float *d, const u32 *a, u64 b) {
#if TILE_M == 8
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16" MMA_TYPES
               "{%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
               : D4(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#elif TILE_M == 16
  asm volatile("wgmma.mma_async.sync.aligned.m64n16k16" MMA_TYPES
               "{%0,%1,%2,%3,%4,%5,%6,%7}, {%8,%9,%10,%11}, %12, 1, 1, 1, 0;"
               : D4(0), D4(4)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#elif TILE_M == 32
  asm volatile("wgmma.mma_async.sync.aligned.m64n32k16" MMA_TYPES
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, {%16,%17,%18,%19}, %20, "
               "1, 1, 1, 0;"
               : D16(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" MMA_TYPES
               "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
               "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
               "{%32,%33,%34,%35}, %36, 1, 1, 1, 0;"
               : D16(0), D16(16)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#endif
}

// -- decoding -------------------------------------------------------------------------------
// A kept place loads its value and moves the pointer to the next row; a pruned one does neither.
template <int I> __device__ __forceinline__ void decode_register(u32 &a, u32 word, u32 &lo, u32 &hi, u32 one) {
#if UNIT == 1
  asm volatile(
      "{\n .reg .pred p, q;\n .reg .b32 t;\n"
      " and.b32 t, %3, %4;\n setp.ne.u32 p, t, 0;\n"
      " and.b32 t, %3, %5;\n setp.ne.u32 q, t, 0;\n"
      " mov.b32 %0, 0;\n"
      " @p ld.shared.u16 %0, [%1];\n @p mad.lo.u32 %1, %6, 128, %1;\n"
      " @q ld.shared.u16 t, [%2];\n @q mad.lo.u32 %2, %6, 128, %2;\n"
      " @q prmt.b32 %0, %0, t, 0x5410;\n}\n"
      : "=&r"(a), "+r"(lo), "+r"(hi)
      : "r"(word), "n"(1u << (2 * I)), "n"(2u << (2 * I)), "r"(one));
#else
  asm volatile(
      "{\n .reg .pred p;\n .reg .b32 t;\n"
      " and.b32 t, %2, %3;\n setp.ne.u32 p, t, 0;\n"
      " mov.b32 %0, 0;\n"
      " @p ld.shared.u32 %0, [%1];\n @p mad.lo.u32 %1, %4, 128, %1;\n}\n"
      : "=&r"(a), "+r"(lo)
      : "r"(word), "n"(1u << I), "r"(one));
#endif
}

__device__ __forceinline__ void decode(u32 *a, u32 word, u32 &lo, u32 &hi, u32 one) {
#define R(i) decode_register<i>(a[i], word, lo, hi, one);
  R(0) R(1) R(2) R(3) R(4) R(5) R(6) R(7) R(8) R(9) R(10) R(11) R(12) R(13) R(14) R(15)
#undef R
}

// -- x --------------------------------------------------------------------------------------
// Core matrices of 8 rows by 8 columns (128 bytes), those of a k next to each other. Rows past the
// end of x are left as they are: they end in columns of D that nobody stores. Columns past K are 0,
// since the weight is 0 there and 0 * NaN is not.
__device__ __forceinline__ void load_x(const Args &args, u32 to, int row, int column) {
#pragma unroll
  for (int i = 0; i < (CHUNKS + THREADS - 1) / THREADS; i++) {
    int piece = threadIdx.x + i * THREADS;
    if (CHUNKS % THREADS && piece >= CHUNKS) break;
    int m = piece & 7, k8 = (piece >> 3) % (STAGE / 8), band = (piece >> 3) / (STAGE / 8);
    int source_row = row + band * 8 + m, k = column + 8 * k8;
    if (source_row >= args.rows) continue;
    u32 target = to + ((k8 * (TILE_M / 8) + band) * 8 + m) * 16;
    const u16 *source = args.x + (long long)source_row * args.x_stride + k;
    int left = args.in_features - k;
    if (args.x_aligned) {
      u32 bytes = left <= 0 ? 0 : left >= 8 ? 16 : 2 * left;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target),
                   "l"(left > 0 ? source : args.x), "r"(bytes)
                   : "memory");
    } else {
      u32 w[4];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        u32 low = 2 * j < left ? source[2 * j] : 0, high = 2 * j + 1 < left ? source[2 * j + 1] : 0;
        w[j] = low | high << 16;
      }
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(w[0]), "r"(w[1]),
                   "r"(w[2]), "r"(w[3])
                   : "memory");
    }
  }
}

// -- kernel ---------------------------------------------------------------------------------
extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1)
    __launch_bounds__(THREADS, BLOCKS_PER_SM) tile_linear(const __grid_constant__ Args args) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
  const int rank = blockIdx.x % SPLITS, block = blockIdx.x / SPLITS;
  const int row0 = blockIdx.y * TILE_M;  // of x
  const int first = (int)((long long)args.segments * rank / SPLITS);
  const int count = (int)((long long)args.segments * (rank + 1) / SPLITS) - first;
  const int strip = block * (GROUPS * 4) + warp;
  const bool alive = strip < args.strips;
  const u32 slot_bytes = (WORDS + args.slot_rows) * 128;
  const u32 x_base = shared_address(memory);
  const u32 own = x_base + STAGES * STAGE_BYTES + warp * args.slots * slot_bytes;
  const u32 bars =
      x_base + STAGES * STAGE_BYTES + GROUPS * 4 * args.slots * slot_bytes + warp * args.slots * 8;

  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  const long long segment0 = (long long)strip * args.segments + first;
  int next_begin = 0, next_end = 0;
  auto find = [&](int i) {
    next_begin = args.offset[segment0 + i];
    next_end = args.offset[segment0 + i + 1];
  };
  auto fetch = [&](int slot, int i) {
    u32 bar = bars + 8 * slot, to = own + slot * slot_bytes;
    u32 bytes = (next_end - next_begin) * 128;
    barrier_expect(bar, bytes + WORDS * 128);
    bulk_copy(to, args.flags + (segment0 + i) * (WORDS * 32), WORDS * 128, bar, policy);
    if (bytes) bulk_copy(to + WORDS * 128, args.val + (long long)next_begin * 64, bytes, bar, policy);
  };
  if (alive && lane < args.slots) {  // one lane for each slot
    if (lane < count) find(lane);
    barrier_init(bars + 8 * lane);
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
    if (lane < count) fetch(lane, lane);
    if (lane == 0 && args.slots < count) find(args.slots);
  }
  __syncwarp();

  const int stages = count * (SEGMENT / STAGE);
  const int column0 = first * SEGMENT;
#pragma unroll
  for (int t = 0; t < (STAGES > 1 ? STAGES - 1 : 1); t++) {
    if (t < stages) load_x(args, x_base + t * STAGE_BYTES, row0, column0 + t * STAGE);
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  float d[TILE_M / 2];
#pragma unroll
  for (int i = 0; i < TILE_M / 2; i++) asm volatile("mov.b32 %0, 0;" : "=f"(d[i]));  // a plain 0 makes ptxas wait after each wgmma
  u32 a[2][16];
  int stage = 0, buffer = 0, slot = 0;
  u32 phase = 0;
  for (int i = 0; i < count; i++) {
    if (alive) barrier_wait(bars + 8 * slot, phase);
    u32 flags = own + slot * slot_bytes + lane * 4;
    u32 lo = flags + WORDS * 128, hi = lo + 2;
#pragma unroll 1
    for (int part = 0; part < SEGMENT / STAGE; part++, stage++) {
      wait_products<0>();  // nobody reads the buffer any more that is filled next
      if (STAGES == 1 && stage) {
        __syncthreads();
        load_x(args, x_base, row0, column0 + stage * STAGE);
        asm volatile("cp.async.commit_group;" ::: "memory");
      }
      wait_copies<(STAGES > 1 ? STAGES - 2 : 0)>();
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      __syncthreads();
      if (STAGES > 1) {
        int ahead = stage + STAGES - 1;
        int target = buffer == 0 ? STAGES - 1 : buffer - 1;
        if (ahead < stages) load_x(args, x_base + target * STAGE_BYTES, row0, column0 + ahead * STAGE);
        asm volatile("cp.async.commit_group;" ::: "memory");
      }
      // no swizzle: 128 bytes to the next 8 rows of x, 16 TILE_M to the next 8 columns
      u64 b = (u64)((x_base + buffer * STAGE_BYTES) >> 4) | (u64)TILE_M << 16 | (u64)8 << 32;
#pragma unroll 1
      for (int step = 0; step < STAGE / 64; step += 2) {
        u32 word[2];
        if (UNIT == 1) {
          asm volatile("ld.shared.u32 %0, [%2];\nld.shared.u32 %1, [%2 + 128];"
                       : "=r"(word[0]), "=r"(word[1])
                       : "r"(flags));
          flags += 256;
        } else {
          asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word[0]) : "r"(flags));
          flags += 128;
        }
        if (!alive) word[0] = word[1] = 0;
        if (UNIT == 2) word[1] = word[0] >> 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          wait_products<1>();
          decode(a[half], word[half], lo, hi, args.one);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int q = 0; q < 4; q++) multiply(d, a[half] + 4 * q, b + (4 * half + q) * (TILE_M * 2));
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        b += 8 * (TILE_M * 2);
      }
      if (++buffer == STAGES) buffer = 0;
    }
    __syncwarp();
    if (alive && lane == 0 && i + args.slots < count) {
      fetch(slot, i + args.slots);
      if (i + 1 + args.slots < count) find(i + 1 + args.slots);
    }
    if (++slot == args.slots) slot = 0, phase ^= 1;
  }
  wait_products<0>();
  __syncthreads();  // the partial sums take the place of x and the slots

  float *partial = (float *)memory + (warp >> 2) * (TILE_M * RED_STRIDE);
  const int g = (warp & 3) * 16 + (lane >> 2), t2 = 2 * (lane & 3);
#pragma unroll
  for (int j = 0; j < TILE_M / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      partial[(8 * j + t2 + (e & 1)) * RED_STRIDE + g + 8 * (e >> 1)] = d[4 * j + e];
  cluster_sync();
  const int columns = min(TILE_M, args.rows - row0);
  const int row_base = block * (GROUPS * 64);
  for (int e = rank * THREADS + tid; e < GROUPS * 64 * columns; e += SPLITS * THREADS) {
    int r = e % (GROUPS * 64), m = e / (GROUPS * 64), n = row_base + r;
    u32 local = x_base + (((r >> 6) * TILE_M + m) * RED_STRIDE + (r & 63)) * 4;
    float part[SPLITS], sum = 0.f;
#pragma unroll
    for (int other = 0; other < SPLITS; other++) {
      u32 remote;
      asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(other));
      asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(part[other]) : "r"(remote) : "memory");
    }
#pragma unroll
    for (int other = 0; other < SPLITS; other++) sum += part[other];
    if (n < args.out_features) {
      if (args.bias) sum += value_of(args.bias[n]);
      args.y[(long long)(row0 + m) * args.out_features + n] = rounded(activated(sum, args.activation));
    }
  }
  cluster_sync();  // the others may still read from here
}
