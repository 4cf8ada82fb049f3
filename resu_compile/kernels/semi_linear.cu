// y = activation(x W^T + bias) by a 2:4 weight, with mma.sp: weights stream from memory straight
// into the registers of the sparse tensor cores, few rows of x lie in shared memory. The layout of W
// is that of semi_weight.py; semi_common.cu comes before this file.

constexpr int STAGE = TILES > 4 ? 128 : CHUNK;  // columns of x of one stage in shared memory
constexpr int STAGES = 3;
constexpr int UNITS = STAGE / 8;       // 16-byte units of a row of a stage
constexpr int PASS = THREADS / UNITS;  // rows of x that the threads of a block copy at once
constexpr int STAGE_BYTES = M_TILE * STAGE * 2;

__device__ __forceinline__ void load_matrices(u32 (&b)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(from));
}

#if BF16
#define MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
#else
#define MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "
#endif

template <int SELECTOR>
__device__ __forceinline__ void mma(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 places) {
    asm(MMA_SP
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),
          "r"(places), "n"(SELECTOR));
}

extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(THREADS, LEAST_BLOCKS) semi_linear(SemiArgs args) {
    extern __shared__ __align__(128) char shared[];  // stages of x, then sums
    const u32 base = u32(__cvta_generic_to_shared(shared));
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    const int n_tiles = (args.row_blocks + WARPS * BLOCKS - 1) / (WARPS * BLOCKS);
    const int rank = blockIdx.x % SPLIT;
    const int n_tile = blockIdx.x / SPLIT % n_tiles;
    const int m0 = blockIdx.x / SPLIT / n_tiles * M_TILE;

    const int share = (args.chunks + SPLIT - 1) / SPLIT;
    const int first = min(rank * share, args.chunks), last = min(first + share, args.chunks);

    float sums[BLOCKS][TILES][4] = {};
    uint4 values[BLOCKS][STEPS], places[BLOCKS];
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

#pragma unroll
    for (int r = 0; r < BLOCKS; r++) {
        if (first < last) {
            places[r] = stream(places_from[r]);
#pragma unroll
            for (int s = 0; s < STEPS; s++) values[r][s] = stream(from[r] + s * 32);
        }
    }

    // one stage of x: M_TILE rows of UNITS 16-byte units; unit u of row i lies at u ^ (i % 8)
    const int stages = (last - first) * (CHUNK / STAGE);
    const int x_row = thread / UNITS, x_unit = thread % UNITS;
    int x_column = first * CHUNK + x_unit * 8;  // of the next stage
    const char* x_from = args.x + (m0 + x_row) * args.x_stride + (long long)x_column * 2;
    auto load_stage = [&](int stage) {
        if (stage < stages) {
            const u32 to = base + stage % STAGES * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < M_TILE; i += PASS) {
                const int row = x_row + i;
                const bool inside = m0 + row < args.m && x_column < args.k;
                const char* at = inside ? x_from + i * args.x_stride : args.x;
                copy16(to + row * (STAGE * 2) + (x_unit ^ row % 8) * 16, at, inside);
            }
            x_column += STAGE;
            x_from += STAGE * 2;
        }
        asm volatile("cp.async.commit_group;");
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; stage++) load_stage(stage);

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
        for (int part = 0; part < CHUNK / STAGE; part++, stage++) {
            asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
            __syncthreads();  // the stage is there, and the one before it is read no more
            load_stage(stage + STAGES - 1);
            const u32 x = base + stage % STAGES * STAGE_BYTES;
#pragma unroll
            for (int i = 0; i < STAGE / 32; i++) {
                const int s = part * (STAGE / 32) + i;
#pragma unroll
                for (int t = 0; t < TILES; t++) {
                    // lane 8 q + j gives the address of row j of the q-th 8 columns
                    const int row = t * 8 + lane % 8, unit = i * 4 + lane / 8;
                    u32 b[4];
                    load_matrices(b, x + row * (STAGE * 2) + (unit ^ row % 8) * 16);
#pragma unroll
                    for (int r = 0; r < BLOCKS; r++) {
                        const u32 word = s / 2 == 0   ? places[r].x
                                         : s / 2 == 1 ? places[r].y
                                         : s / 2 == 2 ? places[r].z
                                                      : places[r].w;
                        if (s % 2 == 0)
                            mma<0>(sums[r][t], values[r][s], b, word);
                        else
                            mma<1>(sums[r][t], values[r][s], b, word);
                    }
                }
                // the registers just used take the same step of the next chunk
                if (more) {
#pragma unroll
                    for (int r = 0; r < BLOCKS; r++) values[r][s] = stream(from[r] + s * 32);
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
