// Encoding, one block a page and KV head, one pass over K and V (codec/balanced.py):
//   k~ = R (s k);  centred on the page's 8-bit mean;  sign + nearest of 4 magnitudes of its own rms;
//   scale = <k~, level> / <level, level>.   v~ = R_v v;  scale = <v~, v~> / <v~, level>.
// A warp keeps its tokens in registers, channel = 32 r + lane; bits are collected by votes.
constexpr int ENCODE_WARPS = D == 256 ? 16 : 8, OWN = PAGE / ENCODE_WARPS;

struct EncodeParams {
  const void *keys, *values;                        // [n, H, PAGE, D], last dimension contiguous; of paged ones, of token 0 of block 0
  i64 key_page, key_head, key_token;                // strides in elements
  i64 value_page, value_head, value_token;
  const int* counts;                                // [n]
  const float* balance;                             // [1 or n, H, D]
  i64 balance_row;
  const int* blocks;                                // [n]: where a page goes, negative for nowhere; or null, one behind the other
  u8 *index, *payload;                              // [N, strides]
  i64 index_stride, payload_stride, index_bytes, payload_bytes;
  int heads;
};

// Tokens that lie in the blocks of a serving engine: position p of page n is in block table[n][p / block].
struct PagedTokens {
  const int* table;                                 // [n, columns], or fewer of every row
  const int* first;                                 // [n]: position of a page's first token
  int columns, block;
};

struct EncodeMemory {
  float sums[ENCODE_WARPS][D];
  float mean[D];
  float scale[PAGE];
  float reduce[ENCODE_WARPS];
  float line[ENCODE_WARPS * LINE];
};

// Bits 0..15 of a and b interleaved: a in even places.
__device__ __forceinline__ u32 interleave(u32 a, u32 b) {
  a = (a | a << 8) & 0x00ff00ff; b = (b | b << 8) & 0x00ff00ff;
  a = (a | a << 4) & 0x0f0f0f0f; b = (b | b << 4) & 0x0f0f0f0f;
  a = (a | a << 2) & 0x33333333; b = (b | b << 2) & 0x33333333;
  a = (a | a << 1) & 0x55555555; b = (b | b << 1) & 0x55555555;
  return a | b << 1; }
__device__ __forceinline__ u32 pick(const u32* words, int i) {
  u32 v = words[0];
#pragma unroll
  for (int r = 1; r < R; r++) v = i == r ? words[r] : v;
  return v; }
// A token's 2-bit codes from the votes on their bits: word of 16 channels a lane.
__device__ __forceinline__ void store_crumbs(u8* to, const u32* low, const u32* high, int lane) {
  if (lane < D / 16) {
    const int shift = (lane & 1) * 16;
    *(u32*)(to + lane * 4) = interleave(pick(low, lane >> 1) >> shift & 0xffff, pick(high, lane >> 1) >> shift & 0xffff);
  } }
__device__ __forceinline__ void store_bits(u8* to, const u32* bits, int lane) { if (lane < R) *(u32*)(to + lane * 4) = pick(bits, lane); }

// Scales of the page's tokens (m.scale) as E4M4 bytes under one base, which is returned by all threads.
__device__ __forceinline__ float store_scales(EncodeMemory& m, u8* to, int count) {
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  __syncthreads();
  float top = 0.f;
  for (int i = tid; i < PAGE; i += ENCODE_WARPS * 32) if (i < count) top = fmaxf(top, m.scale[i]);
  top = warp_max(top);
  if (lane == 0) m.reduce[w] = top;
  __syncthreads();
  top = m.reduce[0];
#pragma unroll
  for (int i = 1; i < ENCODE_WARPS; i++) top = fmaxf(top, m.reduce[i]);
  const float base = top / 1.9375f;
  for (int i = tid; i < PAGE; i += ENCODE_WARPS * 32) {
    const float ratio = i < count && base > 0.f ? fminf(m.scale[i] / base, 1.9375f) : 0.f;
    to[i] = (u8)min((float_to_half(ratio) + 32u) >> 6, 255u);
  }
  __syncthreads();
  return base;
}

// Where the tokens of a warp are, in elements from the first key and value.
struct StridedSource {
  const EncodeParams& p;
  int n, h, first;

  __device__ __forceinline__ i64 key(int i) const { return n * p.key_page + h * p.key_head + (first + i) * p.key_token; }
  __device__ __forceinline__ i64 value(int i) const { return n * p.value_page + h * p.value_head + (first + i) * p.value_token; }
};
struct PagedSource {
  i64 place;                                        // of the token of this lane

  __device__ __forceinline__ i64 key(int i) const { return __shfl_sync(~0u, place, i); }
  __device__ __forceinline__ i64 value(int i) const { return key(i); }
};

template <class Source>
__device__ __forceinline__ void encode_page(const EncodeParams& p, const Source& source, int n, int h, int block, int count) {
  __shared__ EncodeMemory m;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  u8* index = p.index + block * p.index_stride + (i64)h * INDEX_RECORD;
  u8* payload = p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
  float* line = m.line + w * (LINE > 1 ? LINE : 0);
  float x[OWN][R], factor[R];
#pragma unroll
  for (int r = 0; r < R; r++)
    factor[r] = p.balance[n * p.balance_row + h * D + r * 32 + lane] * sign_of(r * 32 + lane, 1) * rotation_gain();
  float sum[R];
#pragma unroll
  for (int r = 0; r < R; r++) sum[r] = 0.f;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    const i64 at = source.key(i) + lane;
#pragma unroll
    for (int r = 0; r < R; r++) x[i][r] = t < count ? load_input(p.keys, at + r * 32) * factor[r] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    rotate(x[i], lane, line);
#pragma unroll
    for (int r = 0; r < R; r++) sum[r] += x[i][r];
  }
#pragma unroll
  for (int r = 0; r < R; r++) m.sums[w][r * 32 + lane] = sum[r];
  __syncthreads();
  float largest = 0.f;
  for (int c = tid; c < D; c += ENCODE_WARPS * 32) {
    float mean = 0.f;
#pragma unroll
    for (int i = 0; i < ENCODE_WARPS; i++) mean += m.sums[i][c];
    mean /= (float)max(count, 1);
    m.mean[c] = mean;
    largest = fmaxf(largest, fabsf(mean));
  }
  largest = warp_max(largest);
  if (lane == 0) m.reduce[w] = largest;
  __syncthreads();
  largest = m.reduce[0];
#pragma unroll
  for (int i = 1; i < ENCODE_WARPS; i++) largest = fmaxf(largest, m.reduce[i]);
  const float step = largest / 127.f;
  float centre[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int c = r * 32 + lane, code = step > 0.f ? __float2int_rn(m.mean[c] / step) : 0;
    centre[r] = (float)code * step;
    if (w == 0) index[MEAN + c] = (u8)code;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    const bool live = t < count;
    float square = 0.f;
#pragma unroll
    for (int r = 0; r < R; r++) {
      x[i][r] = live ? x[i][r] - centre[r] : 0.f;
      square = fmaf(x[i][r], x[i][r], square);
    }
    const float rms = sqrtf(warp_sum(square) / D);
    u32 sign[R], low[R], high[R];
    float dot = 0.f, norm = 0.f;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float a = fabsf(x[i][r]);
      // Thresholds are midpoints of the levels 13, 40, 71, 114 / 53.
      const bool m1 = a > 26.5f / 53.f * rms, m2 = a > 55.5f / 53.f * rms, m3 = a > 92.5f / 53.f * rms;
      const float level = (m3 ? 114.f : m2 ? 71.f : m1 ? 40.f : 13.f) / 53.f;
      dot = fmaf(a, level, dot);
      norm = fmaf(level, level, norm);
      sign[r] = __ballot_sync(~0u, live && x[i][r] >= 0.f);
      low[r] = __ballot_sync(~0u, live && (m3 || (m1 && !m2)));
      high[r] = __ballot_sync(~0u, live && m2);
    }
    dot = warp_sum(dot);
    norm = warp_sum(norm);
    if (lane == 0) m.scale[t] = live ? dot / norm : 0.f;
    store_bits(index + t * CODE, sign, lane);
    store_crumbs(payload + t * TOKEN, low, high, lane);
  }
  const float key_base = store_scales(m, index + KEY_SCALES, count);
#pragma unroll
  for (int r = 0; r < R; r++) factor[r] = sign_of(r * 32 + lane, 2) * rotation_gain();
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    const i64 at = source.value(i) + lane;
#pragma unroll
    for (int r = 0; r < R; r++) x[i][r] = t < count ? load_input(p.values, at + r * 32) * factor[r] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    const bool live = t < count;
    rotate(x[i], lane, line);
    float square = 0.f, dot = 0.f;
#pragma unroll
    for (int r = 0; r < R; r++) square = fmaf(x[i][r], x[i][r], square);
    square = warp_sum(square);
    const float rms = sqrtf(square / D);
    u32 low[R], high[R];
#if VALUE_BITS == 3
    u32 sign[R];
#endif
#pragma unroll
    for (int r = 0; r < R; r++) {
      const float a = fabsf(x[i][r]);
      const bool up = x[i][r] >= 0.f;
#if VALUE_BITS == 3
      const bool m1 = a > 26.5f / 53.f * rms, m2 = a > 55.5f / 53.f * rms, m3 = a > 92.5f / 53.f * rms;
      dot = fmaf(a, (m3 ? 114.f : m2 ? 71.f : m1 ? 40.f : 13.f) / 53.f, dot);
      low[r] = __ballot_sync(~0u, live && (m3 || (m1 && !m2)));
      high[r] = __ballot_sync(~0u, live && m2);
      sign[r] = __ballot_sync(~0u, live && up);
#else
      const bool outer = a > rms;   // levels -1.5, -0.5, 0.5, 1.5 are codes 0..3
      dot = fmaf(a, outer ? 1.5f : 0.5f, dot);
      low[r] = __ballot_sync(~0u, live && up == outer);
      high[r] = __ballot_sync(~0u, live && up);
#endif
    }
    dot = warp_sum(dot);
    if (lane == 0) m.scale[t] = live && dot > 0.f ? square / dot : 0.f;
    store_crumbs(payload + t * TOKEN + D / 4, low, high, lane);
#if VALUE_BITS == 3
    store_bits(payload + t * TOKEN + D / 2, sign, lane);
#endif
  }
  const float value_base = store_scales(m, payload + VALUE_SCALES, count);
  if (tid == 0) {
    float* consts = (float*)(index + CONSTS);
    consts[0] = step;
    consts[1] = key_base;
    consts[2] = value_base;
    if (h == 0) *(int*)(index + (i64)p.heads * INDEX_RECORD) = p.counts[n];
  }
  // Padding is zero, so that equal tokens give equal bytes.
  if (tid < INDEX_RECORD - CONSTS - 12) index[CONSTS + 12 + tid] = 0;
  if (tid < PAYLOAD_RECORD - VALUE_SCALES - PAGE) payload[VALUE_SCALES + PAGE + tid] = 0;
  if (h == 0) {
    for (i64 i = (i64)p.heads * INDEX_RECORD + 4 + tid; i < p.index_bytes; i += ENCODE_WARPS * 32) index[i] = 0;
    for (i64 i = (i64)p.heads * PAYLOAD_RECORD + tid; i < p.payload_bytes; i += ENCODE_WARPS * 32) payload[i] = 0;
  }
}

constexpr int AT_A_TIME = D == 256 || D == 96 ? 1 : 2;   // blocks on a multiprocessor

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, AT_A_TIME) encode(const __grid_constant__ EncodeParams p) {
  const int n = blockIdx.x / p.heads, h = blockIdx.x % p.heads, block = p.blocks ? p.blocks[n] : n;
  if (block < 0) return;
  encode_page(p, StridedSource{p, n, h, (int)threadIdx.x / 32 * OWN}, n, h, block, max(0, min(p.counts[n], PAGE)));
}

extern "C" __global__ void __launch_bounds__(ENCODE_WARPS * 32, AT_A_TIME) encode_paged(const __grid_constant__ EncodeParams p, const __grid_constant__ PagedTokens tokens) {
  const int n = blockIdx.x / p.heads, h = blockIdx.x % p.heads, block = p.blocks[n];
  if (block < 0) return;
  const int count = max(0, min(p.counts[n], PAGE)), lane = threadIdx.x & 31, t = threadIdx.x / 32 * OWN + lane;
  PagedSource source = {0};
  if (lane < OWN && t < count) {
    const int position = tokens.first[n] + t;
    const i64 where = tokens.table[(i64)n * tokens.columns + position / tokens.block];
    source.place = where * p.key_page + h * p.key_head + position % tokens.block * p.key_token;
  }
  encode_page(p, source, n, h, block, count);
}
