// The dense weight of a 2:4 one with 2-byte values. A warp expands 16 rows by 256 columns of the
// layout of semi_weight.py; a lane writes groups of four columns, 8 bytes each.

using u32 = unsigned int;
using u16 = unsigned short;

constexpr int WARPS = 4;

struct UnpackArgs {
    const uint4* values;
    const uint4* places;
    u16* weight;  // (n, k), contiguous
    int n, k;
    int row_blocks;
    int chunks;
};

// Four columns from two values and the places of both, in two words.
__device__ __forceinline__ uint2 expand(u32 pair, u32 code) {
    const u32 first = code & 3, second = code >> 2 & 3;
    const unsigned long long low = (unsigned long long)(pair & 0xffff) << 16 * first;
    const unsigned long long high = (unsigned long long)(pair >> 16) << 16 * second;
    const unsigned long long both = low | high;
    return make_uint2(u32(both), u32(both >> 32));
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) semi_unpack(UnpackArgs args) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const long long tile = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
    if (tile >= (long long)args.row_blocks * args.chunks) return;  // a whole warp
    const int row0 = int(tile / args.chunks) * 16, column0 = int(tile % args.chunks) * 256;
    const uint4 words = args.places[tile * 32 + lane];
#pragma unroll
    for (int step = 0; step < 8; step++) {
        const uint4 values = args.values[tile * 256 + step * 32 + lane];
        const u32 own = step / 2 == 0   ? words.x
                        : step / 2 == 1 ? words.y
                        : step / 2 == 2 ? words.z
                                        : words.w;
        const u32 registers[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int far = 0; far < 2; far++) {
            const u32 word = __shfl_sync(~0u, own, 4 * g + 2 * (step % 2) + far);
            const int column = column0 + step * 32 + far * 16 + t * 4;
#pragma unroll
            for (int high = 0; high < 2; high++) {
                const int row = row0 + g + 8 * high;
                const uint2 four = expand(registers[2 * far + high], word >> (16 * high + 4 * t));
                u16* to = args.weight + (long long)row * args.k + column;
                if (row >= args.n) continue;
                if (args.k % 4 == 0) {
                    if (column < args.k) *reinterpret_cast<uint2*>(to) = four;
                } else {
                    const u32 halves[4] = {four.x, four.x >> 16, four.y, four.y >> 16};
#pragma unroll
                    for (int j = 0; j < 4; j++)
                        if (column + j < args.k) to[j] = u16(halves[j]);
                }
            }
        }
    }
}
