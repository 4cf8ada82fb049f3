// y = activation(x W^T + bias) by a 2:4 weight, with wgmma.sp: for 17 rows of x and more. Weights
// stream from memory into the registers that are the left operand of a warp group's product; x lies
// in shared memory once for all groups of a block. The layout of W is that of semi_weight.py;
// semi_common.cu comes before this file. Compute capability 9.0 alone (target sm_90a).

using u64 = unsigned long long;

constexpr int PANEL = 64;      // columns of x whose rows make 128 bytes, the unit of the swizzle
constexpr int STAGE = 2 * PANEL;  // columns of x of one stage
constexpr int STAGES = 4;      // two that come, one that is read, one whose product may be under way
constexpr int PANEL_BYTES = M_TILE * PANEL * 2;
constexpr int STAGE_BYTES = 2 * PANEL_BYTES;
constexpr int PASS = THREADS / 16;  // rows of x that the threads of a block copy at once
constexpr int SUMS = 4 * TILES;     // of a thread, in a row block

// 128-byte swizzle, rows 128 bytes apart, eights of rows 1024 bytes apart
constexpr u64 PANEL_OF_X = 1ull << 62 | u64(1024 >> 4) << 32 | 1ull << 16;

#if BF16
#define TYPES ".f32.bf16.bf16 "
#else
#define TYPES ".f32.f16.f16 "
#endif
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define A4 "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(x), "r"(places), "n"(SELECTOR)

// d (64 x M_TILE) += a (64 x 32, two of four) x (32 x M_TILE)
template <int SELECTOR>
__device__ __forceinline__ void multiply(float* d, const uint4& a, u64 x, u32 places) {
#if TILES == 4
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n32k32" TYPES
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "{%16, %17, %18, %19}, %20, %21, %22, 1, 1, 1, 0;"
                 : D16(0)
                 : A4);
#else
    static_assert(TILES == 8, "tiles: 4 or 8");
    asm volatile("wgmma.mma_async.sp.sync.aligned.m64n64k32" TYPES
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, %37, %38, 1, 1, 1, 0;"
                 : D16(0), D16(16)
                 : A4);
#endif
}

extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(THREADS, LEAST_BLOCKS) semi_wide(SemiArgs args) {
    extern __shared__ __align__(1024) char shared[];  // stages of x, then sums
    const u32 base = u32(__cvta_generic_to_shared(shared));
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int n_tiles = (args.row_blocks + WARPS * BLOCKS - 1) / (WARPS * BLOCKS);
    const int rank = blockIdx.x % SPLIT;
    const int n_tile = blockIdx.x / SPLIT % n_tiles;
    const int m0 = blockIdx.x / SPLIT / n_tiles * M_TILE;

    const int share = (args.chunks + SPLIT - 1) / SPLIT;
    const int first = min(rank * share, args.chunks), last = min(first + share, args.chunks);

    const uint4 *from[BLOCKS], *places_from[BLOCKS];
#pragma unroll
    for (int r = 0; r < BLOCKS; r++) {
        // past the last row block its sums are made again; they are not stored
        const int row = min(n_tile * WARPS * BLOCKS + block_of(warp, r), args.row_blocks - 1);
        const long long chunk = (long long)row * args.chunks + first;
        from[r] = args.values + chunk * (STEPS * 32) + lane;
        places_from[r] = args.places + chunk * 32 + lane;
        if (lane == 0) prefetch(from[r], places_from[r], min(AHEAD, last - first));
    }
    begin_after_the_kernel_ahead();

    uint4 values[BLOCKS][STEPS], places[BLOCKS];
#pragma unroll
    for (int r = 0; r < BLOCKS; r++) {
        if (first < last) {
            places[r] = stream(places_from[r]);
#pragma unroll
            for (int s = 0; s < STEPS; s++) values[r][s] = stream(from[r] + s * 32);
        }
    }

    // one stage of x: two panels of M_TILE rows of eight 16-byte units; unit u of row i is at u ^ i % 8
    const int stages = (last - first) * (CHUNK / STAGE);
    const int x_row = thread / 16, x_unit = thread % 16;
    int x_column = first * CHUNK + x_unit * 8;  // of the next stage
    const char* x_from = args.x + (m0 + x_row) * args.x_stride + (long long)x_column * 2;
    const u32 x_to = base + x_unit / 8 * PANEL_BYTES + x_row * 128 + (x_unit % 8 ^ x_row % 8) * 16;
    auto load_stage = [&](int stage) {
        if (stage < stages) {
            const u32 to = x_to + stage % STAGES * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < M_TILE; i += PASS) {  // PASS is a multiple of 8: the swizzle stays
                const bool inside = m0 + x_row + i < args.m && x_column < args.k;
                copy16(to + i * 128, inside ? x_from + i * args.x_stride : args.x, inside);
            }
            x_column += STAGE;
            x_from += STAGE * 2;
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int stage = 0; stage < 2; stage++) load_stage(stage);

    float sums[BLOCKS][TILES][4];
#pragma unroll
    for (int r = 0; r < BLOCKS; r++)
#pragma unroll
        for (int i = 0; i < SUMS; i++)  // not a plain 0: ptxas would wait after each product
            asm volatile("mov.b32 %0, 0;" : "=f"(sums[r][i / 4][i % 4]));

    int stage = 0;
    for (int chunk = first; chunk < last; chunk++) {
        const bool more = chunk + 1 < last;
        uint4 next_places[BLOCKS];
#pragma unroll
        for (int r = 0; r < BLOCKS; r++) {
            from[r] += STEPS * 32;
            places_from[r] += 32;
            if (more) next_places[r] = stream(places_from[r]);
        }
#pragma unroll
        for (int s = 0; s < STEPS; s++) {
            if (s % (STAGE / 32) == 0) {
                asm volatile("cp.async.wait_group 1;");
                asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // wgmma reads x
                __syncthreads();
                load_stage(stage + 2);
            }
            const u32 x = base + stage % STAGES * STAGE_BYTES +
                          s % (STAGE / 32) / 2 * PANEL_BYTES + s % 2 * 64;
            const u64 panel = PANEL_OF_X | u64(x >> 4);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int r = 0; r < BLOCKS; r++) {
                const u32 word = s / 2 == 0   ? places[r].x
                                 : s / 2 == 1 ? places[r].y
                                 : s / 2 == 2 ? places[r].z
                                              : places[r].w;
                if (s % 2 == 0)
                    multiply<0>(&sums[r][0][0], values[r][s], panel, word);
                else
                    multiply<1>(&sums[r][0][0], values[r][s], panel, word);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
            if (s % (STAGE / 32) == STAGE / 32 - 1) stage++;
            if (s == 0) continue;
            // the product before this one has ended: its registers take the next chunk
            if (s < STEPS - 1)
                asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
            else
                asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
            if (more) {
#pragma unroll
                for (int r = 0; r < BLOCKS; r++) {
                    values[r][s - 1] = stream(from[r] + (s - 1) * 32);
                    if (s == STEPS - 1) values[r][s] = stream(from[r] + s * 32);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < BLOCKS; r++) places[r] = next_places[r];
    }

    asm volatile("cp.async.wait_all;");
    __syncthreads();  // x is read no more
    finish(args, shared, m0, n_tile, rank, sums);
}
