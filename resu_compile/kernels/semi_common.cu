// What the two kernels of semi_linear.py share: arguments, loads, and the end of a block, where the
// SPLIT blocks of a cluster add their sums through distributed shared memory, in rank order, so that
// the result does not depend on timing.
//
// Defined by the host: BF16 (0 or 1); TILES, eights of rows of x of a block; BLOCKS, row blocks of W
// of a warp; WARPS; SPLIT, blocks that share the columns; AHEAD, chunks of W that are asked into L2
// while the kernel ahead still runs; LEAST_BLOCKS, blocks of a multiprocessor.

using u32 = unsigned int;
using u16 = unsigned short;

constexpr int THREADS = 32 * WARPS;
constexpr int CHUNK = 256;          // columns of W of one load of places
constexpr int STEPS = CHUNK / 32;   // products of a chunk
constexpr int M_TILE = 8 * TILES;   // rows of x of a block
constexpr int N_TILE = 16 * WARPS * BLOCKS;  // rows of W of a block
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
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
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

// Launched before the kernel ahead has ended, whose results are read from here on; until then weights
// come as far as L2, which is coherent. The next kernel may come at any time.
__device__ __forceinline__ void begin_after_the_kernel_ahead() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Position of a warp's r-th block of 16 rows in its block of threads: each four warps take 64 rows
// at a time, as the products of a warp group want it.
__device__ __forceinline__ int block_of(int warp, int r) {
    return (warp / 4 * BLOCKS + r) * 4 + warp % 4;
}

// Adds up the sums of the cluster and stores them. Lane 4 g + t holds, of the 16 rows of W of each
// of its blocks, rows g and g + 8 (i / 2) by rows 8 tile + 2 t + i % 2 of x. All shared memory is
// free to take sums, (M_TILE, SUM_STRIDE) floats.
__device__ __forceinline__ void finish(const SemiArgs& args, char* shared, int m0, int n_tile,
                                       int rank, float (&sums)[BLOCKS][TILES][4]) {
    const u32 base = u32(__cvta_generic_to_shared(shared));
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
    float* out = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int r = 0; r < BLOCKS; r++)
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int row = t * 8 + lane % 4 * 2 + i % 2;
                const int column = block_of(warp, r) * 16 + lane / 4 + i / 2 * 8;
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
