// A page of the paper preset (codec/paper.py): signs of the keys centred on the prompt's mean, their
// magnitudes over the prompt's largest, and values; both in 2 bits between the least and the largest of
// 32 channels, which are the r-th ones of a warp's lanes.
constexpr float LARGEST_HALF = 65504.f;

// Float32 numbers as integers of the same order, and back.
__device__ __forceinline__ int ordered(float x) { const int i = __float_as_int(x); return i < 0 ? i ^ 0x7fffffff : i; }
__device__ __forceinline__ float in_order(int i) { return __int_as_float(i < 0 ? i ^ 0x7fffffff : i); }
__device__ __forceinline__ float to_half_range(float x) { return fminf(fmaxf(x, -LARGEST_HALF), LARGEST_HALF); }

// Codes of a token's channels, one of each group, as votes on their two bits; its scales and zero points.
__device__ __forceinline__ void quantise(const float* x, u32* low, u32* high, u8* scales, u8* zeros, int t, int lane) {
  u16 own_scale = 0, own_zero = 0;   // lane = group
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int i = ordered(x[r]);
    const float least = in_order(__reduce_min_sync(~0u, i)), most = in_order(__reduce_max_sync(~0u, i));
    // Code 0 is the end of the range that half precision holds; from there 3 steps reach four times as far.
    const bool mirrored = least < -LARGEST_HALF && most < -least;
    const float start = mirrored ? most : least, end = mirrored ? least : most, from = to_half_range(start);
    const u32 zero = float_to_half(from), scale = float_to_half(to_half_range((end - from) / 3.f));
    const float step = half_to_float(scale);
    const float code = step != 0.f ? (x[r] - half_to_float(zero)) / step : 0.f;
    const u32 nearest = (u32)fminf(fmaxf(rintf(code), 0.f), 3.f);
    low[r] = __ballot_sync(~0u, nearest & 1);
    high[r] = __ballot_sync(~0u, nearest & 2);
    if (lane == r) { own_scale = (u16)scale; own_zero = (u16)zero; }
  }
  if (lane < R) {
    *(u16*)(scales + t * SCALES + lane * 2) = own_scale;
    *(u16*)(zeros + t * SCALES + lane * 2) = own_zero;
  }
}

template <class Source>
__device__ __forceinline__ void encode_page(const EncodeParams& p, const Source& source, int n, int h, int block, int count) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  u8* index = p.index + block * p.index_stride + (i64)h * INDEX_RECORD;
  u8* payload = p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
  const float* constants = p.constants + n * p.constants_row + (i64)h * CONSTANTS;
  float mean[R], largest[R], x[OWN][R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    mean[r] = constants[r * 32 + lane];
    largest[r] = constants[D + r * 32 + lane];
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const bool live = w * OWN + i < count;
    const i64 at = source.key(i) + lane;
#pragma unroll
    for (int r = 0; r < R; r++) x[i][r] = live ? load_input(p.keys, at + r * 32) - mean[r] : 0.f;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    u32 sign[R], low[R], high[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      sign[r] = __ballot_sync(~0u, t < count && x[i][r] >= 0.f);
      x[i][r] = largest[r] > 0.f ? fabsf(x[i][r]) / largest[r] : 0.f;
    }
    quantise(x[i], low, high, payload + KEY_SCALES, payload + KEY_ZEROS, t, lane);
    store_bits(index + t * CODE, sign, lane);
    store_crumbs(payload + t * TOKEN, low, high, lane);
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const bool live = w * OWN + i < count;
    const i64 at = source.value(i) + lane;
#pragma unroll
    for (int r = 0; r < R; r++) x[i][r] = live ? load_input(p.values, at + r * 32) : 0.f;
  }
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int t = w * OWN + i;
    u32 low[R], high[R];
    quantise(x[i], low, high, payload + VALUE_SCALES, payload + VALUE_ZEROS, t, lane);
    store_crumbs(payload + t * TOKEN + D / 4, low, high, lane);
  }
  if (h == 0) end_page(p, index, payload, p.counts[n]);
}
