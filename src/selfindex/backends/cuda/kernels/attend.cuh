// Attention to the selected tokens, 256 a block and 32 a warp, all query heads of the group at once:
//   logit = (sum_c level_tc q~_c) scale_t / 53 + q~.mean,    out = sum_t p_t v_t
// Both products run on integer tensor cores: keys are signed 8-bit levels looked up by byte
// permutes, queries and probabilities two bytes each. Sums over tokens are integers, so that the
// result does not depend on the order of the warps. merge.cuh puts the blocks' parts together.
constexpr int ATTEND_WARPS = 8, ATTEND_TOKENS = 256;
constexpr int VALUE_WORDS = D / 16, VALUE_PASSES = (VALUE_WORDS + 7) / 8;   // 16-channel words a token
constexpr u32 LEVELS = 13u | 40u << 8 | 71u << 16 | 114u << 24;
constexpr u32 NEGATIVE = 0xF3u | 0xD8u << 8 | 0xB9u << 16 | 0x8Eu << 24;    // -13, -40, -71, -114

__device__ __forceinline__ void mma_values(int* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if VALUE_BITS == 3
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1)); }

// 16 sign bits (bytes 0 and 1, or 2 and 3 of s) -> two a nibble: channels 2 n and 2 n + 1 in nibble n.
__device__ __forceinline__ u32 spread_signs(u32 s, bool upper) {
  u32 y = prmt(s, 0, upper ? 0x4342 : 0x4140);
  y = (y | y << 4) & 0x0f0f0f0f;
  return (y | y << 2) & 0x33333333; }
// Table positions (sign, magnitude) of the even (odd = 0) or odd channels, one a nibble.
__device__ __forceinline__ u32 positions(u32 magnitudes, u32 spread, int odd) {
  return odd ? (magnitudes >> 2 & 0x33333333) | (spread << 1 & 0x44444444) : (magnitudes & 0x33333333) | (spread << 2 & 0x44444444); }
// to[i] = byte i of the four words.
__device__ __forceinline__ void transpose_bytes(u32* to, u32 a, u32 b, u32 c, u32 d) {
  const u32 ab0 = prmt(a, b, 0x5140), ab1 = prmt(a, b, 0x7362), cd0 = prmt(c, d, 0x5140), cd1 = prmt(c, d, 0x7362);
  to[0] = prmt(ab0, cd0, 0x5410); to[1] = prmt(ab0, cd0, 0x7632); to[2] = prmt(ab1, cd1, 0x5410); to[3] = prmt(ab1, cd1, 0x7632); }

template <int N> __device__ __forceinline__ void load_words(u32* to, u64 address) {
  if (N == 4) { const uint4 v = *(const uint4*)address; to[0] = v.x; to[1] = v.y; to[2] = v.z; to[3] = v.w; }
  else if (N == 2 && D != 96) { const uint2 v = *(const uint2*)address; to[0] = v.x; to[1] = v.y; }
  else
#pragma unroll
    for (int i = 0; i < N; i++) to[i] = ((const u32*)address)[i]; }

// Every warp has sums of its own, else they add up by atomics: what shared memory does not take is left
// to the cache, which gathers need to have many loads in flight.
constexpr bool OWN_SUMS = G * D <= 256;

struct AttendMemory {
  int sums[OWN_SUMS ? ATTEND_WARPS : 1][G][D + 8];   // padded: the heads of a quad meet different banks
  float top[ATTEND_WARPS][HEADS], total[ATTEND_WARPS][HEADS];
  int weight[ATTEND_WARPS][HEADS];
  __align__(16) u8 probability[ATTEND_WARPS][HEADS * 2][32];
  uint4 query[G * 2 * FRAGMENT / 16];
};

#ifdef OFFLOADED   // fetch.cuh: tokens lie in the cache or in host memory
#define RECENT , const __grid_constant__ Recent recent
#else
#define RECENT
#endif
extern "C" __global__ void __launch_bounds__(256, D == 128 && G <= 4 && VALUE_BITS == 2 ? 4 : 2) attend(const __grid_constant__ Params p RECENT) {
  __shared__ AttendMemory m;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = lane >> 2, j = lane & 3;
  const int row = blockIdx.y, h = row % p.heads;
  allow_next();   // of the kernels to come, what does not wait for this one
  if (!OWN_SUMS) for (int i = tid; i < G * (D + 8); i += 256) (&m.sums[0][0][0])[i] = 0;
  wait_previous();
  const int k = p.take[row], first = blockIdx.x * ATTEND_TOKENS;
  if (first >= k) return;
  const int base = first + w * 32, valid = k - base;   // tokens of this warp
  const int slot = p.selected[(i64)row * p.width + min(base + lane, k - 1)], t = slot % PAGE;
  for (int i = tid; i < G * 2 * FRAGMENT / 16; i += 256) m.query[i] = ((const uint4*)(p.qfrag + (i64)row * G * 2 * FRAGMENT))[i];
  const float* crec = p.offsets + ((i64)row * p.pages + slot / PAGE) * (HEADS + 4);
  const float4 consts = *(const float4*)(crec + HEADS);
  const u8* index = p.index + (i64)__float_as_int(consts.z) * p.index_stride + (i64)h * INDEX_RECORD;
  const u8* payload = p.payload + (i64)__float_as_int(consts.z) * p.payload_stride + (i64)h * PAYLOAD_RECORD;
  const u8 *content = payload + t * TOKEN, *value_scale = payload + VALUE_SCALES + t;
#ifdef OFFLOADED
  const int place = recent.place[(i64)row * p.width + min(base + lane, k - 1)];
  if (place >= 0) { content = recent.data + (i64)place * ENTRY; value_scale = recent.scales + place; }
#endif
  const u64 token = (u64)content, codes = (u64)(index + t * CODE);
  // Issue every gather before the first use: lane (g, j) reads keys of tokens 8 i + g, channels
  // CHUNK j ..., and values of tokens 8 j + i, channels 16 g ....
  constexpr int SIGN_WORDS = WORDS == 4 ? 2 : 1;
  const int part = D == 96 && j == 3 ? 0 : j;   // channels past the head meet zero queries
  u32 magnitudes[4][WORDS], signs[4][SIGN_WORDS], values[VALUE_PASSES][8];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    load_words<WORDS>(magnitudes[i], __shfl_sync(~0u, token, i * 8 + g) + part * 4 * WORDS);
    const u64 from = __shfl_sync(~0u, codes, i * 8 + g) + part * 2 * WORDS;
    if (WORDS == 1) signs[i][0] = *(const u16*)from;
    else load_words<SIGN_WORDS>(signs[i], from);
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u64 from = __shfl_sync(~0u, token, j * 8 + i) + D / 4;
#pragma unroll
    for (int pass = 0; pass < VALUE_PASSES; pass++) values[pass][i] = ((const u32*)from)[min(pass * 8 + g, VALUE_WORDS - 1)];
  }
#if VALUE_BITS == 3
  u32 value_signs[VALUE_PASSES][8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u64 from = __shfl_sync(~0u, token, j * 8 + i) + D / 2;
#pragma unroll
    for (int pass = 0; pass < VALUE_PASSES; pass++) value_signs[pass][i] = ((const u16*)from)[min(pass * 8 + g, VALUE_WORDS - 1)];
  }
#endif
  const float key_scale = scale_of(index[KEY_SCALES + t]) * consts.x * LEVEL_UNIT;
  const float value_log = lg2(fmaxf(scale_of(*value_scale) * consts.y, 1e-30f));
  const float* offsets = p.offsets + (i64)row * p.pages * (HEADS + 4);
  float logit[QUADS][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int page = __shfl_sync(~0u, slot, i * 8 + g) / PAGE;
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) logit[quad][i] = offsets[(i64)page * (HEADS + 4) + quad * 4 + j];
  }
  __syncthreads();
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    const int column = quad * 4 + (g >> 1), head = quad * 4 + j;
    const uint4* query = m.query + ((min(column, G - 1) * 2 + (g & 1)) * FRAGMENT + j * CHUNK) / 16;
    int s0[4] = {0, 0, 0, 0}, s1[4] = {0, 0, 0, 0};
#pragma unroll
    for (int x = 0; x < WORDS; x++) {
      u32 spread[4];
#pragma unroll
      for (int i = 0; i < 4; i++) spread[i] = spread_signs(signs[i][x / 2], x & 1);
      const uint4 q = query[x];
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        u32 a[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 at = positions(magnitudes[i][x], spread[i], odd);
          a[i][0] = prmt(NEGATIVE, LEVELS, at);
          a[i][1] = prmt(NEGATIVE, LEVELS, at >> 16);
        }
        const u32 b0 = odd ? q.z : q.x, b1 = odd ? q.w : q.y;
        mma_signed(s0, a[0][0], a[1][0], a[0][1], a[1][1], b0, b1);
        mma_signed(s1, a[2][0], a[3][0], a[2][1], a[3][1], b0, b1);
      }
    }
    const int product[4] = {s0[0] * 128 + s0[1], s0[2] * 128 + s0[3], s1[0] * 128 + s1[1], s1[2] * 128 + s1[3]};
    const float gain = head < G ? p.qstep[(i64)row * G + head] * p.scale : 0.f;
    float top = FAR;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float scale = __shfl_sync(~0u, key_scale, i * 8 + g), value = __shfl_sync(~0u, value_log, i * 8 + g);
      logit[quad][i] = fmaf((float)product[i] * gain, scale, logit[quad][i]);
      if (i * 8 + g >= valid) logit[quad][i] = FAR;
      top = fmaxf(top, logit[quad][i] + value);
    }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 4));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
    if (lane < 4) m.top[w][quad * 4 + lane] = top;
  }
  __syncthreads();
  // The scale of a value multiplies its probability; both are taken relative to the block's maximum.
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    float top = m.top[0][quad * 4 + j], total = 0.f;
#pragma unroll
    for (int i = 1; i < ATTEND_WARPS; i++) top = fmaxf(top, m.top[i][quad * 4 + j]);
    int weight = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float value = __shfl_sync(~0u, value_log, i * 8 + g);
      total += ex2(logit[quad][i] - top);
      const int v = __float2int_rn(ex2(logit[quad][i] + value - top) * QUERY_RANGE);
      weight += v;
      m.probability[w][quad * 8 + 2 * j][i * 8 + g] = (u8)(v >> 7);
      m.probability[w][quad * 8 + 2 * j + 1][i * 8 + g] = (u8)(v & 127);
    }
#pragma unroll
    for (int s = 4; s < 32; s <<= 1) { total += __shfl_xor_sync(~0u, total, s); weight += __shfl_xor_sync(~0u, weight, s); }
    if (lane < 4) { m.total[w][quad * 4 + lane] = total; m.weight[w][quad * 4 + lane] = weight; }
  }
  __syncwarp();
  // Rows of the product are channels: 16 word + c in row g, the next one in row g + 8.
  const auto add = [&](int quad, int word, int c, const int* o, int shift) {
    const int head = quad * 4 + j;
    if (word >= VALUE_WORDS || head >= G) return;
    const int first = (o[0] * 128 + o[1]) >> shift, second = (o[2] * 128 + o[3]) >> (shift + (VALUE_BITS == 3 ? 0 : 2));
    int* to = m.sums[OWN_SUMS ? w : 0][head] + c * VALUE_WORDS + word;
    if (OWN_SUMS) { to[0] = first; to[VALUE_WORDS] = second; }
    else { atomicAdd(to, first); atomicAdd(to + VALUE_WORDS, second); }
  };
#pragma unroll
  for (int pass = 0; pass < VALUE_PASSES; pass++) {
    const u32* v = values[pass];
    const int word = pass * 8 + g;
#if VALUE_BITS == 3
    const u32* s = value_signs[pass];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 x[2][4], y[2][4];
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        u32 level[8];
#pragma unroll
        for (int i = 0; i < 8; i++) level[i] = prmt(NEGATIVE, LEVELS, positions(v[i], spread_signs(s[i], false), odd) >> 16 * half);
        transpose_bytes(x[odd], level[0], level[1], level[2], level[3]);
        transpose_bytes(y[odd], level[4], level[5], level[6], level[7]);
      }
#pragma unroll
      for (int quad = 0; quad < QUADS; quad++) {
        const uint2 b = *(const uint2*)&m.probability[w][quad * 8 + g][j * 8];
#pragma unroll
        for (int c = 0; c < 4; c++) {
          int o[4] = {0, 0, 0, 0};
          mma_values(o, x[0][c], x[1][c], y[0][c], y[1][c], b.x, b.y);
          add(quad, word, 8 * half + 2 * c, o, 0);
        }
      }
    }
#else
    u32 x[4], y[4];
    transpose_bytes(x, v[0], v[1], v[2], v[3]);
    transpose_bytes(y, v[4], v[5], v[6], v[7]);
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      const uint2 b = *(const uint2*)&m.probability[w][quad * 8 + g][j * 8];
#pragma unroll
      for (int c = 0; c < 4; c++)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {   // two of the four channels in a byte; codes keep their place
          int o[4] = {0, 0, 0, 0};
          const u32 m0 = 0x03030303u << 2 * i, m1 = m0 << 2;
          mma_values(o, x[c] & m0, x[c] & m1, y[c] & m0, y[c] & m1, b.x, b.y);
          add(quad, word, 4 * c + i, o, 2 * i);
        }
    }
#endif
  }
  __syncthreads();
  float* part_out = p.parts + ((i64)row * p.splits + blockIdx.x) * G * (D + 4);
  for (int i = tid; i < G * D; i += 256) {
    const int head = i / D, c = i % D;
    int whole = 0;
#pragma unroll
    for (int q = 0; q < (OWN_SUMS ? ATTEND_WARPS : 1); q++) whole += m.sums[q][head][c % 16 * VALUE_WORDS + c / 16];
    float sum = (float)whole;
    if (VALUE_BITS == 3) sum *= LEVEL_UNIT;
    else {   // codes 0..3 stand for -1.5 .. 1.5
      int weight = 0;
#pragma unroll
      for (int q = 0; q < ATTEND_WARPS; q++) weight += m.weight[q][head];
      sum -= 1.5f * (float)weight;
    }
    part_out[head * (D + 4) + c] = sum * (1.f / QUERY_RANGE);
  }
  if (tid < G) {
    float top = FAR, total = 0.f;
    for (int q = 0; q < ATTEND_WARPS; q++) { top = fmaxf(top, m.top[q][tid]); total += m.total[q][tid]; }
    part_out[tid * (D + 4) + D] = top;
    part_out[tid * (D + 4) + D + 1] = total;
  }
}
