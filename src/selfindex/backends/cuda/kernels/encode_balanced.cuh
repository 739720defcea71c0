// A page of the balanced preset (codec/balanced.py):
//   k~ = R (s k);  centred on the page's 8-bit mean;  sign + nearest of 4 magnitudes of its own rms;
//   scale = <k~, level> / <level, level>.   v~ = R_v v;  scale = <v~, v~> / <v~, level>.
struct EncodeMemory {
  float sums[ENCODE_WARPS][D];
  float mean[D];
  float scale[PAGE];
  float reduce[ENCODE_WARPS];
  float line[ENCODE_WARPS * LINE];
};

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
    factor[r] = p.constants[n * p.constants_row + h * D + r * 32 + lane] * sign_of(r * 32 + lane, 1) * rotation_gain();
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
  }
  // Padding is zero, so that equal tokens give equal bytes.
  if (tid < INDEX_RECORD - CONSTS - 12) index[CONSTS + 12 + tid] = 0;
  if (tid < PAYLOAD_RECORD - VALUE_SCALES - PAGE) payload[VALUE_SCALES + PAGE + tid] = 0;
  if (h == 0) end_page(p, index, payload, p.counts[n]);
}
