// What the tile kernels are made of: barriers and copies of shared memory, clusters, wgmma, and the
// activations. Comes before tile_linear.cu in one compilation.
//
// Defined by the caller: TILE_M rows of x (8, 16, 32, 64), KIND (1 bfloat16, 2 float16).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

// -- plumbing -------------------------------------------------------------------------------
__device__ __forceinline__ u32 shared_address(const void *p) {
  return (u32)__cvta_generic_to_shared(p);
}

__device__ __forceinline__ void barrier_init(u32 bar, u32 arrivals = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
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
  __syncwarp();  // lanes may leave the loop apart, and wgmma wants them together
}

__device__ __forceinline__ void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(bar), "l"(policy)
      : "memory");
}

template <int PENDING> __device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Address of the same place in the shared memory of another block of the cluster.
__device__ __forceinline__ u32 place_in(u32 local, u32 block) {
  u32 remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(block));
  return remote;
}

__device__ __forceinline__ void send(u32 to, float v, float w, u32 bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(to), "f"(v), "f"(w), "r"(bar)
      : "memory");
}

__device__ __forceinline__ void send(u32 to, float v, float w, float y, float z, u32 bar) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(to), "f"(v), "f"(w), "f"(y), "f"(z), "r"(bar)
      : "memory");
}

// Where a row of sums has column m: two pairs of a lane stand side by side, to be sent as one.
__device__ __forceinline__ int column_of(int m) {
  return TILE_M == 8 ? m : (m & ~15) | (m & 6) << 1 | (m & 8) >> 2 | (m & 1);
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

__device__ __forceinline__ void multiply(float *d, const u32 *a, u32 b_low) {
  u64 b = (u64)b_low | 1ull << 62 | 64ull << 32;  // swizzle 128, 1024 bytes to the next 8 rows
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
