// Attention to the selected tokens of the paper preset, a warp 32 of them, all query heads of the group at
// once. With the 2-bit codes m and n of keys and values, signs s, and scales and zero points of 32
// channels r:
//   logit = sum_r key_scale_tr (sum_c s_tc m_tc q_c) + key_zero_tr (sum_c s_tc q_c),     q: times the largest keys
//   out   = sum_t p_t (value_zero_tr + value_scale_tr n_tc)
// Sums over channels run on integer tensor cores, a group of 32 a product, with queries of two bytes; sums
// over tokens on those for bfloat16, with p value_scale as the sum of two. q.mean, the same for all tokens,
// is added by merge.cuh.
constexpr int ATTEND_WARPS = D == 256 ? 4 : 8, ATTEND_TOKENS = 32 * ATTEND_WARPS, ATTEND_THREADS = ATTEND_TOKENS;

// A token in shared memory: codes of its key and its value, signs, then the four scales of each group.
// The stride leaves eight neighbours in different banks.
constexpr int SIGNS = D / 2, SCALE_ROOM = R == 3 ? 8 : SCALE, SCALES_AT = (SIGNS + CODE + 15) / 16 * 16;
constexpr int TOKEN_ROOM = D == 64 ? 80 : D == 256 ? 240 : 112;
static_assert(SCALES_AT + 4 * SCALE_ROOM <= TOKEN_ROOM && TOKEN_ROOM % 16 == 0, "a token fits its room");
constexpr int QUERY_ROW = D == 96 ? D : D + 32;           // bytes; likewise
constexpr int WEIGHT_ROW = 80;                            // bytes of 32 weights, likewise
constexpr int SUM_ROW = D + 8;                            // floats, likewise

struct AttendMemory {
  union {
    __align__(16) u8 tokens[ATTEND_TOKENS][TOKEN_ROOM];
    float sums[ATTEND_WARPS][4][SUM_ROW];                 // of a quad of heads
  };
  __align__(16) u8 weights[ATTEND_WARPS][8][WEIGHT_ROW];  // bfloat16: of a head, upper and lower part
  __align__(16) u8 query[G * 2][QUERY_ROW];
  float top[ATTEND_WARPS][HEADS], total[ATTEND_WARPS][HEADS];
  float step[HEADS];                                      // of the queries
};
static_assert(sizeof(AttendMemory) <= 48 * 1024, "static shared memory");

// 8 signs -> two a nibble: channels 2 n and 2 n + 1 in nibble n.
__device__ __forceinline__ u32 spread_signs(u32 s) {
  s = (s | s << 4) & 0x0f0f;
  return (s | s << 2) & 0x3333; }

template <int N> __device__ __forceinline__ void copy_async(u8* to, const u8* from) {
  if constexpr (N == 16) asm volatile("cp.async.cg.shared.global [%0],[%1],16;" :: "r"(shared_address(to)), "l"(from) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0],[%1],%2;" :: "r"(shared_address(to)), "l"(from), "n"(N) : "memory"); }

// PARTS times 16 bytes of every token of a warp, of which each lane says where its own lie. Neighbouring lanes
// copy what lies together, so that an instruction meets fewer lines of the cache; their tokens are so far apart
// that they meet different banks.
template <int PARTS> __device__ __forceinline__ void copy_together(u8* to, const u8* own, int lane) {
#pragma unroll
  for (int i = 0; i < PARTS; i++) {
    const int n = i * 32 + lane, part = n % PARTS;
    const int token = PARTS == 4 ? i * 8 + (lane >> 3) + (lane & 4)
                    : PARTS == 2 ? i * 16 + (lane >> 4) * 8 + (lane >> 3 & 1) + (lane & 6) : n / PARTS;
    const u8* from = (const u8*)__shfl_sync(~0u, (u64)own, token);
    copy_async<16>(to + token * TOKEN_ROOM + part * 16, from + part * 16);
  }
}

// A query head times the largest keys as bytes, a warp a head; q.mean, of which one block tells merge.cuh.
__device__ __forceinline__ void prepare_head(const Params& p, AttendMemory& m, int row, int g, bool publish) {
  const int b = row / p.heads, h = row % p.heads, lane = threadIdx.x & 31;
  const i64 at = b * p.query_row + (i64)(h * G + g) * p.query_head;
  const float* constants = p.constants + b * p.constants_row + (i64)h * CONSTANTS;
  float x[R], offset = 0.f, top = 0.f;
#pragma unroll
  for (int r = 0; r < R; r++) {
    x[r] = load_input(p.query, at + r * 32 + lane);
    offset = fmaf(x[r], constants[r * 32 + lane], offset);
    x[r] *= constants[D + r * 32 + lane];
    top = fmaxf(top, fabsf(x[r]));
  }
  top = fmaxf(warp_max(top), 1e-30f);
  offset = warp_sum(offset);
  const float inverse = QUERY_RANGE * reciprocal(top);
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int c = r * 32 + lane, v = __float2int_rn(x[r] * inverse), hi = (v + 64) >> 7, lo = v - (hi << 7);
    const int place = (c & ~7) + (c & 1) * 4 + (c & 7) / 2;   // even channels of eight, then odd ones
    m.query[g * 2][place] = (u8)hi;
    m.query[g * 2 + 1][place] = (u8)lo;
  }
  if (lane == 0) m.step[g] = top * (1.f / QUERY_RANGE);
  if (publish && lane == 0) p.offsets[(i64)row * G + g] = offset;
}

// Scales of groups r and r + 1, r even, of one of the four arrays.
__device__ __forceinline__ u32 two_scales(const u8* token, int array, int r) { return *(const u32*)(token + SCALES_AT + array * SCALE_ROOM + 2 * r); }
__device__ __forceinline__ float one_of(u32 pair, int r) { return half_to_float(r & 1 ? pair >> 16 : pair & 0xffff); }

__device__ __forceinline__ void mma_bfloat(float* c, const u32* a, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)); }

// Channel c of four 2-bit codes at bits 0 .. 7 and 16 .. 23, as a pair of bfloat16: in the mantissa of 128
// a code is 128 + 4^c code.
__device__ __forceinline__ u32 code_pair(u32 x, int c) {
  constexpr u32 gain[3] = {0x3F803F80u, 0x3E803E80u, 0x3D803D80u}, shift[3] = {0xC300C300u, 0xC200C200u, 0xC100C100u};
  const int at = c == 3 ? 2 : c;
  return multiply_add_bfloat2(((c == 3 ? x >> 2 : x) & 0x00030003u << 2 * at) | 0x43004300u, gain[at], shift[at]); }

#ifdef OFFLOADED   // fetch.cuh: tokens lie in the cache or in host memory
#define RECENT , const __grid_constant__ Recent recent
#else
#define RECENT
#endif
extern "C" __global__ void __launch_bounds__(ATTEND_THREADS, G <= 4 && D < 256 ? 4 : 1) attend(const __grid_constant__ Params p RECENT) {
  __shared__ AttendMemory m;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, g = lane >> 2, j = lane & 3;
  const int row = blockIdx.y, h = row % p.heads;
  allow_next();   // of the kernels to come, what does not wait for this one
  wait_previous();
  const int k = p.take[row], first = blockIdx.x * ATTEND_TOKENS;
  if (first >= k) return;
  const int valid = k - first - w * 32;   // tokens of this warp
  {
    const int slot = p.selected[(i64)row * p.width + min(first + tid, k - 1)], t = slot % PAGE;
    const i64 block = p.table[(i64)(row / p.heads) * p.pages + slot / PAGE];
    const u8* codes = p.index + block * p.index_stride + (i64)h * INDEX_RECORD + t * CODE;
    const u8* payload = p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
    const u8* content = payload + t * TOKEN;
    const u8* scales = payload + KEY_SCALES + t * SCALES;
#ifdef OFFLOADED
    const int place = recent.place[(i64)row * p.width + min(first + tid, k - 1)];
    if (place >= 0) {
      content = recent.data + (i64)place * ENTRY;
      scales = content + TOKEN;
    }
#endif
    copy_together<TOKEN / 16>(m.tokens[w * 32], content, lane);
    u8* to = m.tokens[tid];
    constexpr int UNIT = D == 96 ? 4 : D == 64 ? 8 : 16;
#pragma unroll
    for (int i = 0; i < CODE; i += UNIT) copy_async<UNIT>(to + SIGNS + i, codes + i);
    if constexpr (R == 3) {   // each of the four gets room for one more
#pragma unroll
      for (int i = 0; i < 4 * R; i++) ((u16*)(to + SCALES_AT))[i / R * 4 + i % R] = ((const u16*)scales)[i];
    } else copy_together<SCALES / 16>(m.tokens[w * 32] + SCALES_AT, scales, lane);
  }
  for (int head = w; head < G; head += ATTEND_WARPS) prepare_head(p, m, row, head, blockIdx.x == 0);   // meanwhile
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  // Lane (g, j) has rows of tokens 8 i + g, channels 32 r + 8 j ..; columns are a head's two query bytes.
  const u8* own[4];
#pragma unroll
  for (int i = 0; i < 4; i++) own[i] = m.tokens[w * 32 + i * 8 + g];
  float logit[QUADS][4];
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) logit[quad][0] = logit[quad][1] = logit[quad][2] = logit[quad][3] = 0.f;
  u32 scales[4], zeros[4];
#pragma unroll
  for (int r = 0; r < R; r++) {
    u32 level[4][2], sign[4][2];   // even and odd channels, signed bytes
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const u32 codes = *(const u16*)(own[i] + r * 8 + j * 2), spread = spread_signs(own[i][SIGNS + r * 4 + j]);
      // Sign and code of four channels, one a nibble.
      const u32 even = (codes & 0x3333) | (spread << 2 & 0x4444), odd = (codes >> 2 & 0x3333) | (spread << 1 & 0x4444);
      level[i][0] = prmt(0xFDFEFF00u, 0x03020100u, even);
      level[i][1] = prmt(0xFDFEFF00u, 0x03020100u, odd);
      sign[i][0] = prmt(0xFFFFFFFFu, 0x01010101u, even);
      sign[i][1] = prmt(0xFFFFFFFFu, 0x01010101u, odd);
      if (r % 2 == 0) { scales[i] = two_scales(own[i], 0, r); zeros[i] = two_scales(own[i], 1, r); }
    }
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      const uint2 q = *(const uint2*)&m.query[min(quad * 4 + (g >> 1), G - 1) * 2 + (g & 1)][r * 32 + j * 8];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        int levels[4] = {}, signs[4] = {};
        mma_signed(levels, level[2 * t][0], level[2 * t + 1][0], level[2 * t][1], level[2 * t + 1][1], q.x, q.y);
        mma_signed(signs, sign[2 * t][0], sign[2 * t + 1][0], sign[2 * t][1], sign[2 * t + 1][1], q.x, q.y);
#pragma unroll
        for (int i = 0; i < 2; i++) {
          float& sum = logit[quad][2 * t + i];
          sum = fmaf(one_of(scales[2 * t + i], r), (float)(levels[2 * i] * 128 + levels[2 * i + 1]), sum);
          sum = fmaf(one_of(zeros[2 * t + i], r), (float)(signs[2 * i] * 128 + signs[2 * i + 1]), sum);
        }
      }
    }
  }
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    const int head = quad * 4 + j;
    const float gain = head < G ? m.step[head] * p.scale : 0.f;
    float top = FAR;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      logit[quad][i] = i * 8 + g < valid ? logit[quad][i] * gain : FAR;
      top = fmaxf(top, logit[quad][i]);
    }
#pragma unroll
    for (int s = 4; s < 32; s <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, s));
    if (lane < 4) m.top[w][quad * 4 + lane] = top;
  }
  __syncthreads();
  float (&probability)[QUADS][4] = logit;   // relative to the block's maximum
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    float top = m.top[0][quad * 4 + j], total = 0.f;
#pragma unroll
    for (int i = 1; i < ATTEND_WARPS; i++) top = fmaxf(top, m.top[i][quad * 4 + j]);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      probability[quad][i] = i * 8 + g < valid ? ex2(logit[quad][i] - top) : 0.f;
      total += probability[quad][i];
    }
#pragma unroll
    for (int s = 4; s < 32; s <<= 1) total += __shfl_xor_sync(~0u, total, s);
    if (lane < 4) m.total[w][quad * 4 + lane] = total;
  }

  // Rows are channels 32 r + 4 g + c of tokens 4 i + j, columns a head's two parts of its weights.
  float sum[QUADS][R][4];
  u8* weights = &m.weights[w][0][0];
#pragma unroll
  for (int r = 0; r < R; r++) {
    u32 a[2][2][4];   // channels 2 c and 2 c + 1, tokens 4 (4 step + ..) + j
#pragma unroll
    for (int step = 0; step < 2; step++) {
      u32 pair[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u8* from = m.tokens[w * 32 + (4 * step + 2 * i) * 4 + j] + D / 4 + r * 8 + g;
        pair[i] = from[0] | (u32)from[4 * TOKEN_ROOM] << 16;
      }
#pragma unroll
      for (int c = 0; c < 2; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) a[step][c][i] = code_pair(pair[i >> 1], 2 * c + (i & 1));
    }
    if (r % 2 == 0)
#pragma unroll
      for (int i = 0; i < 4; i++) { scales[i] = two_scales(own[i], 2, r); zeros[i] = two_scales(own[i], 3, r); }
#pragma unroll
    for (int quad = 0; quad < QUADS; quad++) {
      float zero = 0.f;
      __syncwarp();   // the weights before have been read
#pragma unroll
      for (int i = 0; i < 4; i++) {
        zero = fmaf(probability[quad][i], one_of(zeros[i], r), zero);
        const float weight = probability[quad][i] * one_of(scales[i], r);
        const u32 upper = bfloat_pair(weight) & 0xffff;
        // Token 8 i + g is the 2 i + g / 4-th of lane g % 4.
        u8* to = weights + 2 * j * WEIGHT_ROW + ((g & 3) * 8 + 2 * i + (g >> 2)) * 2;
        *(u16*)to = (u16)upper;
        *(u16*)(to + WEIGHT_ROW) = (u16)bfloat_pair(weight - __uint_as_float(upper << 16));
      }
#pragma unroll
      for (int s = 4; s < 32; s <<= 1) zero += __shfl_xor_sync(~0u, zero, s);
      __syncwarp();
      const uint4 b = *(const uint4*)(weights + g * WEIGHT_ROW + j * 16);
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float o[4] = {0.f, 0.f, 0.f, 0.f};
        mma_bfloat(o, a[0][c], b.x, b.y);
        mma_bfloat(o, a[1][c], b.z, b.w);
        sum[quad][r][2 * c] = o[0] + o[1] + zero;
        sum[quad][r][2 * c + 1] = o[2] + o[3] + zero;
      }
    }
  }
  float* part_out = p.parts + ((i64)row * p.splits + blockIdx.x) * G * (D + 4);
#pragma unroll
  for (int quad = 0; quad < QUADS; quad++) {
    __syncthreads();   // of the tokens, or the sums before, everything has been read
#pragma unroll
    for (int r = 0; r < R; r++)
      *(float4*)&m.sums[w][j][r * 32 + 4 * g] = make_float4(sum[quad][r][0], sum[quad][r][1], sum[quad][r][2], sum[quad][r][3]);
    __syncthreads();
    for (int i = tid; i < 4 * D; i += ATTEND_THREADS) {
      const int head = quad * 4 + i / D, c = i % D;
      if (head >= G) break;
      float whole = 0.f;
#pragma unroll
      for (int q = 0; q < ATTEND_WARPS; q++) whole += m.sums[q][i / D][c];
      part_out[head * (D + 4) + c] = whole;
    }
  }
  if (tid < G) {
    float top = FAR, total = 0.f;
    for (int q = 0; q < ATTEND_WARPS; q++) { top = fmaxf(top, m.top[q][tid]); total += m.total[q][tid]; }
    part_out[tid * (D + 4) + D] = top;
    part_out[tid * (D + 4) + D + 1] = total;
  }
}
