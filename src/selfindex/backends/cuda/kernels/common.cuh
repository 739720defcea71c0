// Shared by all kernels: layout of a page, arguments, and one-instruction helpers. No headers, so
// that NVRTC needs none. The host defines D (head_dim), G (query heads a KV head), VALUE_BITS,
// IN_TYPE (0 float32, 1 float16, 2 bfloat16), SIGN_GAIN (the length of a sign, in scales),
// SELECT_SHARPNESS (factor on the logits that select) and CLUSTERS (0 where thread block clusters
// are missing). PAPER is 1 in modules that begin with paper.cuh: pages of the paper preset.
#ifndef PAPER
#define PAPER 0
#endif
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr int PAGE = 128;            // tokens a page
constexpr int R = D / 32;            // channels a lane, channel = r * 32 + lane
constexpr int QUADS = (G + 3) / 4;   // tensor core columns serve 4 query heads at a time
constexpr int HEADS = QUADS * 4;

// Record of a head in the index plane and in the payload plane (codec/format.py).
constexpr int CODE = D / 8;
constexpr int TOKEN = D / 4 + D / 4 + (VALUE_BITS == 3 ? D / 8 : 0);
#if PAPER
constexpr int CONSTANTS = 18 * D;    // float32 a head: mean [D], largest [D], codebook [D / 4, 16, 4]
constexpr int INDEX_RECORD = PAGE * CODE;
// A token's float16, one for 32 channels: scales and zero points of the key and of the value, side by side.
constexpr int SCALE = 2 * R, SCALES = 4 * SCALE;   // bytes of each, of all
constexpr int KEY_SCALES = PAGE * TOKEN, KEY_ZEROS = KEY_SCALES + SCALE, VALUE_SCALES = KEY_ZEROS + SCALE, VALUE_ZEROS = VALUE_SCALES + SCALE;
constexpr int PAYLOAD_RECORD = PAGE * (TOKEN + SCALES);
#else
constexpr int CONSTANTS = D;         // float32 a head: balance
constexpr int KEY_SCALES = PAGE * CODE;
constexpr int MEAN = KEY_SCALES + PAGE;
constexpr int CONSTS = MEAN + D;     // float32 mean step, key base, value base
constexpr int INDEX_RECORD = (CONSTS + 12 + 15) / 16 * 16;
constexpr int VALUE_SCALES = PAGE * TOKEN;
constexpr int PAYLOAD_RECORD = (VALUE_SCALES + PAGE + 15) / 16 * 16;
#endif

// Query channels as the attention kernel multiplies them: a quarter warp owns CHUNK channels.
constexpr int WORDS = D == 64 ? 1 : D == 256 ? 4 : 2;   // 16-channel magnitude words a lane
constexpr int CHUNK = 16 * WORDS;
constexpr int FRAGMENT = 4 * CHUNK;                     // bytes; channels D.. are zero

// The query in the score: four digits -1, 0, 1 to the base 3, each a bit plane of its ones and one of
// its negative ones.
constexpr int COARSE = 40;                              // the largest such number
constexpr float LEVEL_UNIT = 1.f / 53.f;                // levels 13, 40, 71, 114
constexpr float QUERY_RANGE = 16256.f;                  // 127 * 128: two signed bytes
constexpr float FAR = -1e30f;                           // logit of what does not exist

struct Params {
  const void* query;          // [B, H * G, 1, D], strides in elements
  i64 query_row, query_head;
  const float* constants;     // [1 or B, H, CONSTANTS]
  i64 constants_row;
  const u8* index;            // [N, index_stride]
  i64 index_stride;
  const u8* payload;
  i64 payload_stride;
  const int* table;           // [B, M]
  const int* counts;          // [B, M]
  const int* budgets;         // [B]
  u8* scratch;                // score codes that do not fit shared memory
  int* take;                  // [rows]: tokens to select
  u8* qfrag;                  // [rows, G, 2, FRAGMENT] query bytes in the attention's order; balanced only
  float* qstep;               // [rows, G]: step of the 15-bit query; balanced only
  float* offsets;             // [rows, M, HEADS + 4]: q.mean a head; key base, value base, block. Paper: [rows, G], q.mean
  int* selected;              // [rows, width] ascending slots
  float* parts;               // [rows, splits, G, D + 4]: sums, maximum, total
  float* out;                 // [B, H * G, 1, D]
  float* lse;                 // [B, H * G, 1]
  int heads, pages, width, splits, cluster, cta_pages;
  int resident;               // pages of a block whose codes lie in shared memory
  int ring_keys;              // keys of its other pages lie where the ring was, else over their codes in scratch
  float scale;                // softmax scaling * log2(e)
};

__device__ __forceinline__ u32 prmt(u32 a, u32 b, u32 s) {
  u32 d; asm("prmt.b32 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(s)); return d; }
__device__ __forceinline__ float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
// Division proper has a slow path, whose branch keeps loads from being issued together.
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x)); return y; }
// Store to device memory what should stay in the L2 cache until it is read.
__device__ __forceinline__ void store_kept(void* p, u32 v) {
  asm volatile("st.global.L2::cache_hint.u32 [%0],%1,%2;" ::"l"(p), "r"(v), "l"(0x14F0000000000000ull) : "memory"); }   // evict_last
__device__ __forceinline__ float half_to_float(u32 h) {
  float f; asm("{.reg .b16 t; cvt.u16.u32 t,%1; cvt.f32.f16 %0,t;}" : "=f"(f) : "r"(h)); return f; }
__device__ __forceinline__ u32 float_to_half(float f) {
  u16 h; asm("cvt.rn.f16.f32 %0,%1;" : "=h"(h) : "f"(f)); return h; }
__device__ __forceinline__ u32 halves(float lo, float hi) {
  u32 d; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(d) : "f"(hi), "f"(lo)); return d; }
__device__ __forceinline__ float scale_of(u32 code) { return half_to_float(code << 6); }   // E4M4
__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Pairs of halves.
__device__ __forceinline__ u32 multiply2(u32 a, u32 b) { u32 d; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 add2(u32 a, u32 b) { u32 d; asm("add.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 max2(u32 a, u32 b) { u32 d; asm("max.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ u32 ex2_2(u32 a) { u32 d; asm volatile("ex2.approx.f16x2 %0,%1;" : "=r"(d) : "r"(a)); return d; }
// Pairs of bfloat16.
__device__ __forceinline__ u32 bfloat_pair(float x) { u32 d; asm("cvt.rn.bf16x2.f32 %0,%1,%1;" : "=r"(d) : "f"(x)); return d; }
__device__ __forceinline__ u32 multiply_add_bfloat2(u32 a, u32 b, u32 c) {
  u32 d; asm("fma.rn.bf16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }

__device__ __forceinline__ void mma_signed(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x += __shfl_xor_sync(~0u, x, m);
  return x; }
__device__ __forceinline__ u32 warp_sum(u32 x) { return __reduce_add_sync(~0u, x); }
__device__ __forceinline__ int warp_sum(int x) { return __reduce_add_sync(~0u, x); }
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int m = 16; m; m >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, m));
  return x; }

// Element i of an input tensor as float32.
__device__ __forceinline__ float load_input(const void* p, i64 i) {
#if IN_TYPE == 0
  return ((const float*)p)[i];
#elif IN_TYPE == 1
  return half_to_float(((const u16*)p)[i]);
#else
  return __uint_as_float((u32)((const u16*)p)[i] << 16);
#endif
}

// Four neighbouring elements of the model's dtype.
__device__ __forceinline__ float4 load4(const void* p, i64 i) {
#if IN_TYPE == 0
  return *(const float4*)((const float*)p + i);
#else
  const uint2 v = *(const uint2*)((const u16*)p + i);
#if IN_TYPE == 1
  return make_float4(half_to_float(v.x & 0xffff), half_to_float(v.x >> 16), half_to_float(v.y & 0xffff), half_to_float(v.y >> 16));
#else
  return make_float4(__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16), __uint_as_float(v.y & 0xffff0000u));
#endif
#endif
}

// Programmatic dependent launch: the next kernel may start early, and waits for this one's results.
__device__ __forceinline__ void wait_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ u32 load_shared(u32 at) { u32 v; asm volatile("ld.shared.u32 %0,[%1];" : "=r"(v) : "r"(at)); return v; }
__device__ __forceinline__ void store_shared(u32 at, u32 v) { asm volatile("st.shared.u32 [%0],%1;" ::"r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ void load_shared2(u32* to, u32 at) { asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(at)); }
__device__ __forceinline__ void load_shared4(u32* to, u32 at) {
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(at)); }
