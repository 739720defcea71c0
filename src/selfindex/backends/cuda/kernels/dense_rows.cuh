// Shared by the kernels of attention to every token: arguments, decoding of levels, and how query
// rows come in and go out. Rows of a KV head are numbered group * queries + query.
constexpr int PART = D + 4;                            // floats: sums, maximum, total
constexpr float SLACK = 8.f;                           // sums are rescaled when a maximum grows by this
constexpr u32 HIGH = 0x5754514Au, LOW = 0x20700080u;   // bytes of 13, 40, 71, 114 in fp16
constexpr int KEY_WORDS = (2 * R + 3) / 4, SIGN_WORDS = (R + 3) / 4, CODE_WORDS = (R + 3) / 4;
constexpr int STAGE = INDEX_RECORD + PAYLOAD_RECORD;
constexpr int MERGE_WARPS = 4;

struct DenseParams {
  const void* query;          // [B, H * groups, queries, D], strides in elements
  i64 query_row, query_head, query_token;
  const float* constants;     // [1 or B, H, CONSTANTS]
  i64 constants_row;
  const u8* index;            // [N, index_stride]
  i64 index_stride;
  const u8* payload;
  i64 payload_stride;
  const int* table;           // [B, M]
  const int* counts;          // [B, M]
  float* parts;               // [B * H, splits, groups * queries, PART] where splits > 1
  float* out;                 // [B, H * groups, queries, D]
  float* lse;                 // [B, H * groups, queries]
  int heads, groups, queries, pages, splits;
  float scale;                // softmax scaling * log2(e)
};

__device__ __forceinline__ u32 fma_halves(u32 a, u32 b, u32 c) {
  u32 d; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(d) : "r"(a), "r"(b), "r"(c)); return d; }
__device__ __forceinline__ u32 multiply_halves(u32 a, u32 b) {
  u32 d; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(d) : "r"(a), "r"(b)); return d; }
__device__ __forceinline__ void copy_async(u8* to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(shared_address(to)), "l"(from) : "memory"); }

// N bytes as words, with the widest loads that the address allows: it is a multiple of N, or of 2.
template <int N> __device__ __forceinline__ void load_bytes(u32* to, const u8* from) {
  if constexpr (N == 16) { const uint4 v = *(const uint4*)from; to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w; }
  else if constexpr (N == 8) { const uint2 v = *(const uint2*)from; to[0] = v.x; to[1] = v.y; }
  else if constexpr (N == 6) { const u16* v = (const u16*)from; to[0] = v[0] | v[1] << 16; to[1] = v[2]; }
  else if constexpr (N == 4) to[0] = *(const u32*)from;
  else if constexpr (N == 3) to[0] = from[0] | from[1] << 8 | from[2] << 16;
  else if constexpr (N == 2) to[0] = *(const u16*)from;
  else to[0] = from[0]; }

// Levels of the 4 lowest places, as two pairs of fp16: the table's, negative and positive.
struct LevelTable { u32 high, low; };                  // bytes of four positive fp16 numbers
__device__ __forceinline__ void levels(u32 at, u32& first, u32& second, const LevelTable& table) {
  const u32 high = prmt(table.high ^ 0x80808080u, table.high, at), low = prmt(table.low, table.low, at);
  first = prmt(low, high, 0x5140);
  second = prmt(low, high, 0x7362); }

#if PAPER
// Magnitudes of 32 channels of a token, over KEY_GAIN: those far beyond the prompt's largest, of which
// half precision holds four times its largest number, stay in the range.
constexpr float KEY_GAIN = 8.f;
__device__ __forceinline__ LevelTable level_table(const u8* payload, int token, int r) {
  const float scale = half_at(payload + KEY_SCALES + token * SCALES + 2 * r) / KEY_GAIN;
  const float zero = half_at(payload + KEY_ZEROS + token * SCALES + 2 * r) / KEY_GAIN;
  const u32 lower = halves(zero, zero + scale), upper = halves(fmaf(2.f, scale, zero), fmaf(3.f, scale, zero));
  return {prmt(lower, upper, 0x7531), prmt(lower, upper, 0x6420)}; }
// A token's values of 32 channels from the levels 2 code - 3 of `code_pairs`, times a factor: scale and
// centre, a pair of fp16.
__device__ __forceinline__ u32 value_line(const u8* payload, int token, int r, float factor) {
  const float scale = half_at(payload + VALUE_SCALES + token * SCALES + 2 * r), zero = half_at(payload + VALUE_ZEROS + token * SCALES + 2 * r);
  return halves(0.5f * scale * factor, fmaf(1.5f, scale, zero) * factor); }
// No value of a token is larger.
__device__ __forceinline__ float value_bound(const u8* payload, int token) {
  float bound = 0.f;
#pragma unroll
  for (int r = 0; r < R; r++)
    bound = fmaxf(bound, fmaf(3.f, fabsf(half_at(payload + VALUE_SCALES + token * SCALES + 2 * r)), fabsf(half_at(payload + VALUE_ZEROS + token * SCALES + 2 * r))));
  return fmaxf(bound, 1e-20f); }
#else
constexpr float KEY_GAIN = 1.f;
// +-13 .. +-114.
__device__ __forceinline__ void levels(u32 at, u32& first, u32& second) { levels(at, first, second, LevelTable{HIGH, LOW}); }
#endif

// 2-bit value codes, 8 in each half of a word, as 2 code - 3: b[c] pairs the c-th of both halves.
__device__ __forceinline__ void code_pairs(u32* b, u32 codes) {
  // A code 2 c + 1 bits up in the mantissa of 1024 is 1024 + 2 4^c code.
#pragma unroll
  for (int c = 0; c < 8; c++) {
    constexpr u32 gain[4] = {0x3C00u, 0x3400u, 0x2C00u, 0x2400u};     // 4^-c
    constexpr u32 shift[4] = {0xE403u, 0xDC0Cu, 0xD430u, 0xCCC0u};    // -1024 4^-c - 3
    const u32 placed = c < 4 ? codes << 1 : codes >> 7;
    b[c] = fma_halves((placed & 0x00060006u << 2 * (c & 3)) | 0x64006400u, gain[c & 3] * 0x10001u, shift[c & 3] * 0x10001u);
  }
}

// Rotate the tile's queries (paper: times the largest keys) and hand them to put(row, channel, fp16).
// Returns the factor that was divided out, the same for all rows so that logits share it.
template <int ROWS, int WARPS, class Put> __device__ __forceinline__ float load_queries(const DenseParams& p, int first, float* line, float* reduce, Put put) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  const float* constants = p.constants + b * p.constants_row + (i64)h * CONSTANTS + (PAPER ? D : 0);
  float factor[R], top = 1e-30f, x[R];
#pragma unroll
  for (int r = 0; r < R; r++)
    factor[r] = PAPER ? constants[r * 32 + lane] : sign_of(r * 32 + lane, 1) * rotation_gain() / constants[r * 32 + lane];
  const auto load = [&](int row) {
    const int at = first + row, g = at / p.queries;
    const bool live = g < p.groups;
    const i64 from = b * p.query_row + (i64)(h * p.groups + g) * p.query_head + (i64)(at - g * p.queries) * p.query_token;
#pragma unroll
    for (int r = 0; r < R; r++) x[r] = live ? load_input(p.query, from + r * 32 + lane) * factor[r] : 0.f;
  };
  for (int row = w; row < ROWS; row += WARPS) {
    load(row);
#if PAPER
#pragma unroll
    for (int r = 0; r < R; r++) top = fmaxf(top, fabsf(x[r]));
#else
    float square = 0.f;   // no channel of the rotated query exceeds its length
#pragma unroll
    for (int r = 0; r < R; r++) square = fmaf(x[r], x[r], square);
    top = fmaxf(top, sqrtf(warp_sum(square) * D));
#endif
  }
  if (PAPER) top = warp_max(top);
  if (lane == 0) reduce[w] = top;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < WARPS; i++) top = fmaxf(top, reduce[i]);
  for (int row = w; row < ROWS; row += WARPS) {
    load(row);
    rotate(x, lane, line + w * (LINE > 1 ? LINE : 0));
#pragma unroll
    for (int r = 0; r < R; r++) put(row, r * 32 + lane, (u16)float_to_half(x[r] / top));
  }
  return top;
}

// Rotate a row's sums back and write its output.
__device__ __forceinline__ void finish_row(const DenseParams& p, float* x, float top, float total, int row, float* line) {
  const int lane = threadIdx.x & 31;
  const i64 to = (i64)blockIdx.y * p.groups * p.queries + row;
  rotate_back(x, lane, line);
  const float gain = total > 0.f ? rotation_gain() * (PAPER ? 1.f : VALUE_BITS == 3 ? LEVEL_UNIT : 0.5f) / total : 0.f;
#if PAPER
  // q.mean, which all logits lack.
  const int g = row / p.queries, b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  const i64 from = b * p.query_row + (i64)(h * p.groups + g) * p.query_head + (i64)(row - g * p.queries) * p.query_token;
  const float* mean = p.constants + b * p.constants_row + (i64)h * CONSTANTS;
  float offset = 0.f;
#pragma unroll
  for (int r = 0; r < R; r++) offset = fmaf(load_input(p.query, from + r * 32 + lane), mean[r * 32 + lane], offset);
  top = fmaf(warp_sum(offset), p.scale, top);
#endif
#pragma unroll
  for (int r = 0; r < R; r++) p.out[to * D + r * 32 + lane] = x[r] * gain * sign_of(r * 32 + lane, 2);
  if (lane == 0) p.lse[to] = total > 0.f ? (top + lg2(total)) * 0.69314718f : -__int_as_float(0x7f800000);
}

// Finish a row, or keep its sums for the merge of the splits.
__device__ __forceinline__ void store_row(const DenseParams& p, float* x, float top, float total, int row, int split, float* line) {
  if (p.splits == 1) return finish_row(p, x, top, total, row, line);
  const int lane = threadIdx.x & 31;
  float* to = p.parts + (((i64)blockIdx.y * p.splits + split) * p.groups * p.queries + row) * PART;
#pragma unroll
  for (int r = 0; r < R; r++) to[r * 32 + lane] = x[r];
  if (lane == 0) { to[D] = top; to[D + 1] = total; }
}

// Merge the splits of a query row; one block a row.
extern "C" __global__ void __launch_bounds__(MERGE_WARPS * 32) dense_merge(const __grid_constant__ DenseParams p) {
  __shared__ float shared_part[MERGE_WARPS][PART], line[LINE];
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5, row = blockIdx.x;
  const i64 stride = (i64)p.groups * p.queries * PART;
  const float* part = p.parts + ((i64)blockIdx.y * p.splits * p.groups * p.queries + row) * PART;
  wait_previous();
  float best = FAR, total = 0.f, x[R];
  for (int s = lane; s < p.splits; s += 32) best = fmaxf(best, part[s * stride + D]);
  best = warp_max(best);
#pragma unroll
  for (int r = 0; r < R; r++) x[r] = 0.f;
#pragma unroll 4
  for (int s = w; s < p.splits; s += MERGE_WARPS) {
    const float* from = part + s * stride;
    const float factor = ex2(from[D] - best);
    total = fmaf(from[D + 1], factor, total);
#pragma unroll
    for (int r = 0; r < R; r++) x[r] = fmaf(from[r * 32 + lane], factor, x[r]);
  }
#pragma unroll
  for (int r = 0; r < R; r++) shared_part[w][r * 32 + lane] = x[r];
  if (lane == 0) shared_part[w][D] = total;
  __syncthreads();
  if (w > 0) return;
  for (int i = 1; i < MERGE_WARPS; i++) {
#pragma unroll
    for (int r = 0; r < R; r++) x[r] += shared_part[i][r * 32 + lane];
    total += shared_part[i][D];
  }
  finish_row(p, x, best, total, row, line);
}
