// y = act(x W^T + bias) on the format of tile_weight.py; follows tile_common.cu.
//
// A warp decodes a strip of 16 rows straight into the registers that wgmma takes as its left
// operand; x lies in shared memory, so that a place of the weight costs the same at every number of
// rows of x.
//
// The SPLITS blocks of a cluster share out the columns: each keeps its columns of x in shared
// memory and walks over rows of W. A block is GROUPS warpgroups; each takes 64 rows at a time, on
// its own. A warp copies the segments of its strip (flags and streams) ahead of itself into SLOTS
// slots with the bulk copy engine, across the ends of strips. The partial sums of 64 rows are sent
// through the shared memory of the cluster; one block adds up 64 / SPLITS rows in a fixed order,
// and does so after its next 64 rows are decoded, so that nobody waits.
//
// Defined by the caller: TILE_M rows of x (8, 16, 32, 64), GROUPS, UNIT, SEGMENT, SLOTS, SPLITS
// (1, 2, 4, 8), SUMS buffers for partial sums (1, 2), KIND (1 bfloat16, 2 float16).

#define THREADS (GROUPS * 128)
#define WORDS (SEGMENT / 64 / UNIT)     // flag words of a lane in a segment
#define X_BYTES (TILE_M * SEGMENT * 2)  // x of one segment
#define SHARE (64 / SPLITS)             // rows that a block adds up
#define SUM_STRIDE (TILE_M + 4)         // floats of such a row, so that reads meet all banks
#define SUM_BYTES (64 * SUM_STRIDE * 4)

struct Args {
  const u32 *flags;
  const int *offset;
  const u16 *val;
  const u16 *x;
  const u16 *bias;
  u16 *y;
  int rows, out_features, in_features, x_stride;
  int segments, strips, slot_rows, held_segments, clusters, activation, x_aligned;
  int scale[8];  // 128 >> i
};

// -- decoding -------------------------------------------------------------------------------
// A kept place loads its value and moves the pointer by a row. The flag alone, still in its place
// within a byte, times the place's scale is that step: each pointer is a new register, since an
// address that a load has yet to read may not be overwritten, and the product runs on the other
// pipe than the logic. The scales are arguments because a known power of two would become a shift.
template <int I>
__device__ __forceinline__ void decode_register(u32 &a, const u32 *bytes, u32 &lo, u32 &hi,
                                                const int *scale) {
  u32 next;
#if UNIT == 1
  asm volatile(
      "{\n .reg .pred p;\n .reg .b32 t;\n"
      " and.b32 t, %3, %4;\n setp.ne.u32 p, t, 0;\n"
      " mov.b32 %0, 0;\n"
      " @p ld.shared.u16 %0, [%2];\n mad.lo.u32 %1, t, %5, %2;\n}\n"
      : "=&r"(a), "=&r"(next)
      : "r"(lo), "r"(bytes[I / 4]), "n"(1u << (2 * I % 8)), "r"(scale[2 * I % 8]));
  lo = next;
  asm volatile(
      "{\n .reg .pred p;\n .reg .b32 t, v;\n"
      " and.b32 t, %3, %4;\n setp.ne.u32 p, t, 0;\n"
      " @p ld.shared.u16 v, [%2];\n mad.lo.u32 %1, t, %5, %2;\n"
      " @p prmt.b32 %0, %0, v, 0x5410;\n}\n"
      : "+r"(a), "=&r"(next)
      : "r"(hi), "r"(bytes[I / 4]), "n"(2u << (2 * I % 8)), "r"(scale[2 * I % 8 + 1]));
  hi = next;
#else
  asm volatile(
      "{\n .reg .pred p;\n .reg .b32 t;\n"
      " and.b32 t, %3, %4;\n setp.ne.u32 p, t, 0;\n"
      " mov.b32 %0, 0;\n"
      " @p ld.shared.u32 %0, [%2];\n mad.lo.u32 %1, t, %5, %2;\n}\n"
      : "=&r"(a), "=&r"(next)
      : "r"(lo), "r"(bytes[I / 8]), "n"(1u << (I % 8)), "r"(scale[I % 8]));
  lo = next;
#endif
}

__device__ __forceinline__ void decode(u32 *a, u32 word, u32 &lo, u32 &hi, const int *scale) {
  u32 bytes[4] = {word, word >> 8, word >> 16, word >> 24};
#define R(i) decode_register<i>(a[i], bytes, lo, hi, scale);
  R(0) R(1) R(2) R(3) R(4) R(5) R(6) R(7) R(8) R(9) R(10) R(11) R(12) R(13) R(14) R(15)
#undef R
}

// -- x --------------------------------------------------------------------------------------
// Blocks of 64 columns; a row of a block is 128 bytes, its 16-byte pieces swizzled by the row as
// wgmma's 128-byte mode wants it, so that neither the copy nor the product meets a bank conflict.
// Rows past the end of x are left as they are: they end in columns of D that nobody stores. Columns
// past K are 0, since the weight is 0 there and 0 * NaN is not.
__device__ __forceinline__ void load_x(const Args &args, u32 to, int row, int column,
                                       int segments) {
  for (int piece = threadIdx.x; piece < segments * (X_BYTES / 16); piece += THREADS) {
    int k8 = piece & 7, m = (piece >> 3) % TILE_M, k64 = piece / (8 * TILE_M);
    int source_row = row + m, k = column + 64 * k64 + 8 * k8;
    if (source_row >= args.rows) continue;
    u32 target = to + k64 * (TILE_M * 128) + m * 128 + (k8 ^ (m & 7)) * 16;
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
extern "C" __global__ void __cluster_dims__(SPLITS, 1, 1) __launch_bounds__(THREADS, 1)
    tile_linear(const __grid_constant__ Args args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const int tid = threadIdx.x, lane = tid & 31;
  const int warp = __shfl_sync(~0u, tid >> 5, 0), group = warp >> 2;  // known to be uniform
  const int rank = blockIdx.x % SPLITS, cluster = blockIdx.x / SPLITS;
  const int row0 = blockIdx.y * TILE_M;  // of x
  const int first = args.segments * rank / SPLITS;
  const int count = args.segments * (rank + 1) / SPLITS - first;
  const int blocks = (args.strips + 3) / 4;  // of 64 rows
  const int stride = args.clusters * GROUPS, block0 = group * args.clusters + cluster;
  const int items = block0 < blocks ? (blocks - 1 - block0) / stride + 1 : 0;
  const int rounds = (blocks - 1 - cluster) / stride + 1;

  const u32 slot_bytes = (WORDS + args.slot_rows) * 128;
  const u32 x_base = shared_address(memory);
  const u32 sums = x_base + args.held_segments * X_BYTES + group * (SUMS * SUM_BYTES);
  const u32 slots = x_base + args.held_segments * X_BYTES + GROUPS * (SUMS * SUM_BYTES);
  const u32 own = slots + warp * (SLOTS * slot_bytes);
  const u32 all_bars = slots + GROUPS * 4 * SLOTS * slot_bytes;
  const u32 bars = all_bars + warp * (SLOTS * 8);                         // a slot is filled
  const u32 sum_bars = all_bars + GROUPS * (4 * SLOTS * 8) + group * 24;  // sums came
  const u32 free_bar = sum_bars + 16;                                     // all have read theirs

  // Segments of this warp in order: those of its columns, of one strip after the other.
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  const int strip0 = block0 * 4 + (warp & 3);
  int copies = 0;  // how many segments there are to copy; strips past the end have none
  if (strip0 < args.strips) copies = ((args.strips - 1 - strip0) / (stride * 4) + 1) * count;
  // Each of the first lanes starts with the segment of its slot, lane 0 goes on from there.
  int next_strip = strip0 + lane / count * (stride * 4), next_segment = lane % count;
  int next_begin = 0, next_end = 0;
  auto find = [&] {
    long long index = (long long)next_strip * args.segments + first + next_segment;
    next_begin = args.offset[index];
    next_end = args.offset[index + 1];
  };
  auto fetch = [&](int slot) {
    long long index = (long long)next_strip * args.segments + first + next_segment;
    u32 bar = bars + 8 * slot, to = own + slot * slot_bytes;
    u32 bytes = (next_end - next_begin) * 128;
    barrier_expect(bar, bytes + WORDS * 128);
    bulk_copy(to, args.flags + index * (WORDS * 32), WORDS * 128, bar, policy);
    const u16 *values = args.val + (long long)next_begin * 64;
    if (bytes) bulk_copy(to + WORDS * 128, values, bytes, bar, policy);
  };
  auto skip = [&](int segments) {
    next_segment += segments;
    while (next_segment >= count) next_segment -= count, next_strip += stride * 4;
  };
  const bool first_copies = lane < SLOTS && lane < copies;
  if (lane == 0) {
    for (int i = 0; i < SLOTS; i++) barrier_init(bars + 8 * i);
    if ((warp & 3) == 0) {
      barrier_init(sum_bars);
      barrier_init(sum_bars + 8);
      barrier_init(free_bar, SPLITS);
      for (int i = 0; i < SUMS; i++) barrier_expect(sum_bars + 8 * i, 64 * TILE_M * 4);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncwarp();
  // the others may send once all barriers are there; waited for before the first send
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");

  auto wait_x = [&] {
    asm volatile("cp.async.wait_all;\nfence.proxy.async.shared::cta;" ::: "memory");
    __syncthreads();
  };
  // All that the kernels before have written may be read from here on; the next kernel may start
  // where a block of this one has ended.
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
  if (first_copies) find();
  // x goes first: behind the weight of all blocks it would come microseconds later
  const bool stays = count <= args.held_segments;
  if (stays) load_x(args, x_base, row0, first * SEGMENT, count);
  if (first_copies) fetch(lane);
  skip(SLOTS);
  if (lane == 0 && SLOTS < copies) find();
  if (stays) wait_x();

  // Sums of 64 / SPLITS rows of an item, from all blocks of the cluster.
  auto finish = [&](int item) {
    u32 bar = sum_bars + 8 * (item % SUMS), from = sums + item % SUMS * SUM_BYTES;
    barrier_wait(bar, item / SUMS & 1);
    if ((tid & 127) == 0) barrier_expect(bar, 64 * TILE_M * 4);  // for the next use
    int row_base = (block0 + item * stride) * 64 + rank * SHARE;
    int columns = min(TILE_M, args.rows - row0);
    for (int e = tid & 127; e < SHARE * columns; e += 128) {
      int r = e % SHARE, m = e / SHARE, n = row_base + r;
      float part[SPLITS], sum = 0.f;
#pragma unroll
      for (int other = 0; other < SPLITS; other++)
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(part[other])
                     : "r"(from + ((other * SHARE + r) * SUM_STRIDE + column_of(m)) * 4));
#pragma unroll
      for (int other = 0; other < SPLITS; other++) sum += part[other];
      if (n < args.out_features) {
        if (args.bias) sum += value_of(args.bias[n]);
        args.y[(long long)(row0 + m) * args.out_features + n] =
            rounded(activated(sum, args.activation));
      }
    }
  };

  float d[TILE_M / 2];
  u32 a[2][16];
  int slot = 0, left = copies;
  u32 phase = 0;
  for (int item = 0; item < (stays ? items : rounds); item++) {
#pragma unroll
    for (int i = 0; i < TILE_M / 2; i++)
      asm volatile("mov.b32 %0, 0;" : "=f"(d[i]));  // a plain 0 makes ptxas wait after each wgmma
    for (int segment = 0, held = 0; segment < count; segment++, held++) {
      if (!stays && (segment == 0 || held == args.held_segments)) {
        wait_products<0>();
        __syncthreads();
        int held_now = min(args.held_segments, count - segment);
        load_x(args, x_base, row0, (first + segment) * SEGMENT, held_now);
        wait_x();
        held = 0;
      }
      if (item >= items) continue;  // here for the copies of x alone
      const bool alive = strip0 + item * (stride * 4) < args.strips;
      u32 flags = own + slot * slot_bytes + lane * 4;
      if (alive) {
        barrier_wait(bars + 8 * slot, phase);
      } else {
        for (int i = 0; i < WORDS; i++)
          asm volatile("st.shared.u32 [%0], 0;" ::"r"(flags + 128 * i) : "memory");
      }
      u32 lo = flags + WORDS * 128, hi = lo + 2;
      u32 b = (x_base + held * X_BYTES) >> 4 | 1 << 16;
#pragma unroll 1
      for (int step = 0; step < SEGMENT / 64; step += 2) {
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
        if (UNIT == 2) word[1] = word[0] >> 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
          wait_products<1>();
          decode(a[half], word[half], lo, hi, args.scale);
          asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
          for (int q = 0; q < 4; q++)
            multiply(d, a[half] + 4 * q, b + half * (TILE_M * 8) + 2 * q);
          asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        b += 2 * (TILE_M * 8);
      }
      __syncwarp();
      if (alive && lane == 0 && left > SLOTS) {
        fetch(slot);
        skip(1);
        if (left > SLOTS + 1) find();
      }
      left--;
      __syncwarp();
      if (++slot == SLOTS) slot = 0, phase ^= 1;
    }
    wait_products<0>();
    if (item == 0) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (item >= items) continue;
    if (SUMS == 2) {
      // Once all have sent item i + 1, all have finished item i: its place may be written again.
      if (item) finish(item - 1);
      asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
    } else if (item) {
      barrier_wait(free_bar, item - 1 & 1);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      int row = (warp & 3) * 16 + 8 * h + (lane >> 2);
      u32 to = place_in(sums + item % SUMS * SUM_BYTES, row / SHARE);
      u32 bar = place_in(sum_bars + 8 * (item % SUMS), row / SHARE);
      to += ((rank * SHARE + row % SHARE) * SUM_STRIDE) * 4;
#if TILE_M == 8
      send(to + (lane & 3) * 8, d[2 * h], d[2 * h + 1], bar);
#else
#pragma unroll
      for (int j = 0; j < TILE_M / 16; j++)
        send(to + (lane & 3) * 16 + 64 * j, d[8 * j + 2 * h], d[8 * j + 2 * h + 1],
             d[8 * j + 4 + 2 * h], d[8 * j + 4 + 2 * h + 1], bar);
#endif
    }
    if (SUMS == 1) {
      finish(item);
      asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
      if ((tid & 127) < SPLITS)
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                         place_in(free_bar, tid & 127))
                     : "memory");
    }
  }
  if (!items && stays) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  if (SUMS == 2 && items) finish(items - 1);
#if SUMS == 1
  if (items) barrier_wait(free_bar, items - 1 & 1);  // nobody writes here after the end
#endif
}
