// y = activation(x W^T + bias) by a 2:4 weight, with mma.sp: weights stream from memory straight
// into the registers of the sparse tensor cores. The layout of W is that of semi_weight.py.
//
// A block takes 16 * WARPS * BLOCKS rows of W, 8 * TILES rows of x and a SPLIT-th of the columns; the
// SPLIT blocks of a cluster add their sums through distributed shared memory, in rank order, so
// that the result does not depend on timing.
//
// Defined by the host: BF16 (0 or 1), TILES, BLOCKS, WARPS, SPLIT, AHEAD (chunks of W that are asked
// into L2 while the kernel ahead still runs), LEAST_BLOCKS (blocks of an SM).

using u32 = unsigned int;
using u16 = unsigned short;

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 256;                      // columns of W of one load of places
constexpr int STEPS = CHUNK / 32;               // mma.sp of a chunk
constexpr int STAGE = TILES > 4 ? 128 : CHUNK;  // columns of x of one stage in shared memory
constexpr int STAGES = 3;
constexpr int UNITS = STAGE / 8;  // 16-byte units of a row of a stage
constexpr int PASS = THREADS / UNITS;  // rows of x that the threads of a block copy at once
constexpr int M_TILE = 8 * TILES;
constexpr int STAGE_BYTES = M_TILE * STAGE * 2;
constexpr int N_TILE = 16 * WARPS * BLOCKS;
constexpr int SUM_STRIDE = N_TILE + 4;  // floats; keeps the writes of a warp in different banks

struct SemiArgs {
    const uint4* values;
    const uint4* places;
    const char* x;
    const u16* bias16;    // of the dtype of x, or null
    const float* bias32;  // or null
    u16* y;
    long long x_stride;  // bytes from one row of x to the next
    int m, n, k;
    int row_blocks;  // of 16 rows
    int chunks;      // of CHUNK columns
    int activation;  // position in plan.ACTIVATIONS
};

__device__ __forceinline__ uint4 stream(const uint4* from) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(from));
    return v;
}

__device__ __forceinline__ void prefetch(const uint4* values, const uint4* places, int chunks) {
#if __CUDA_ARCH__ >= 900 && AHEAD > 0
    if (chunks <= 0) return;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(values),
                 "r"(chunks * STEPS * 32 * 16));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(places), "r"(chunks * 32 * 16));
#endif
}

__device__ __forceinline__ void copy16(u32 to, const void* from, bool inside) {
    // outside of x: no byte is read, 16 zeros are written
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(inside ? 16 : 0));
}

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

__device__ __forceinline__ float to_float(u16 bits) {
#if BF16
    return __uint_as_float(u32(bits) << 16);
#else
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(bits));
    return wide;
#endif
}

__device__ __forceinline__ u16 rounded(float value) {
    u16 bits;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
#endif
    return bits;
}

__device__ __forceinline__ float activated(float v, int activation) {
    switch (activation) {
        case 1: return v > 0.0f || v != v ? v : 0.0f;  // relu keeps NaN
        case 2: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
        case 3:
            return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
        case 4: return v / (1.0f + expf(-v));
        default: return v;
    }
}

__device__ __forceinline__ void sync_cluster() {
#if SPLIT > 1
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

__device__ __forceinline__ float4 sums_of(u32 here, int rank) {
    float4 v;
#if SPLIT > 1
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(here), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
#else
    const u32 there = here;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
#endif
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
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
        const int row = min((n_tile * WARPS + warp) * BLOCKS + r, args.row_blocks - 1);
        const long long chunk = (long long)row * args.chunks + first;
        from[r] = args.values + chunk * (STEPS * 32) + lane;
        places_from[r] = args.places + chunk * 32 + lane;
        if (lane == 0) prefetch(from[r], places_from[r], min(AHEAD, last - first));
    }
#if __CUDA_ARCH__ >= 900
    // Launched before the kernel ahead has ended, whose results are read from here on; until then
    // weights come as far as L2, which is coherent. The next kernel may come at any time.
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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
    __syncthreads();  // x is read no more: its memory takes the sums, (M_TILE, SUM_STRIDE) floats
    float* out = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < BLOCKS; r++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = t * 8 + lane % 4 * 2 + i % 2;
                const int column = (warp * BLOCKS + r) * 16 + lane / 4 + i / 2 * 8;
                out[row * SUM_STRIDE + column] = sums[r][t][i];
            }
    sync_cluster();
    constexpr int QUADS = N_TILE / 4;
    for (int i = rank * THREADS + thread; i < M_TILE * QUADS; i += SPLIT * THREADS) {
        const int row = i / QUADS, column = i % QUADS * 4;
        const int m = m0 + row, n = n_tile * N_TILE + column;
        if (m >= args.m || n >= args.n) continue;
        const u32 here = base + (row * SUM_STRIDE + column) * 4;
        float sum[4] = {};
#pragma unroll
        for (int other = 0; other < SPLIT; other++) {
            const float4 part = sums_of(here, other);
            sum[0] += part.x, sum[1] += part.y, sum[2] += part.z, sum[3] += part.w;
        }
        u16* y = args.y + (long long)m * args.n + n;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (n + j >= args.n) break;
            if (args.bias16) sum[j] += to_float(args.bias16[n + j]);
            if (args.bias32) sum[j] += args.bias32[n + j];
            y[j] = rounded(activated(sum[j], args.activation));
        }
    }
#if SPLIT > 1
    sync_cluster();  // others may still read the sums of this block
#endif
}
