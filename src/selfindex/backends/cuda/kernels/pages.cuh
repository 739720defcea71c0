// Pages decoded to keys and values of the model's own domain, in its dtype; a block a page and KV head, a
// warp 16 of its tokens. A preset has what a block shares (`Memory`), `begin` and, behind a barrier, `decode`.
constexpr int PAGES_WARPS = 8, PAGES_THREADS = 32 * PAGES_WARPS, OWN = PAGE / PAGES_WARPS;

struct PagesParams {
  const u8* index;            // [N, index_stride]
  i64 index_stride;
  const u8* payload;
  i64 payload_stride;
  const int *table, *counts;  // [B, M], rows apart
  i64 table_row, counts_row;
  const int* starts;          // [B]: place of a row's first token
  const float* constants;     // [1 or B, H, CONSTANTS]
  i64 constants_row;
  void *keys, *values;        // [H, tokens, D], strides in elements
  i64 key_head, key_token, value_head, value_token, tokens;
  int heads;
};

// A lane has 8 neighbouring channels of each half of a token's, so that a warp's stores are whole lines; a
// token takes LANES lanes, and a warp AT_ONCE tokens at a time.
constexpr int LANES = D == 96 ? 8 : D / 16, AT_ONCE = 32 / LANES;
__device__ __forceinline__ int channel_of(int slice, int i) { return (i >> 3) * (D / 2) + slice * 8 + (i & 7); }

#if IN_TYPE == 1   // no infinities
__device__ __forceinline__ float in_range(float x) { return fminf(fmaxf(x, -65504.f), 65504.f); }
#endif
__device__ __forceinline__ void store_channel(void* to, i64 at, float x) {
#if IN_TYPE == 0
  ((float*)to)[at] = x;
#elif IN_TYPE == 1
  ((u16*)to)[at] = (u16)float_to_half(in_range(x));
#else
  ((u16*)to)[at] = (u16)bfloat_pair(x);
#endif
}
__device__ __forceinline__ void store_channels(void* to, i64 at, const float* x) {   // 8 of them
#if IN_TYPE == 0
  *(float4*)((float*)to + at) = make_float4(x[0], x[1], x[2], x[3]);
  *(float4*)((float*)to + at + 4) = make_float4(x[4], x[5], x[6], x[7]);
#else
  u32 pair[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
#if IN_TYPE == 1
    pair[i] = halves(in_range(x[2 * i]), in_range(x[2 * i + 1]));
#else
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair[i]) : "f"(x[2 * i + 1]), "f"(x[2 * i]));
#endif
  *(uint4*)((u16*)to + at) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
#endif
}

// The codes of a lane's 16 channels: n bytes of each half's.
__device__ __forceinline__ u32 read2(const u8* from) { return __ldg((const u16*)from) | (u32)__ldg((const u16*)(from + D / 8)) << 16; }
__device__ __forceinline__ u32 read1(const u8* from) { return __ldg(from) | (u32)__ldg(from + D / 16) << 8; }

// What a block decodes: page and head, and where its tokens go.
struct Place {
  const u8 *index, *payload;  // records of the head
  i64 first;                  // place of the first token
  int count, head;
};

// Whether a token has a place among those that there is room for.
__device__ __forceinline__ bool fits(const PagesParams& p, const Place& place, int token) {
  return token < place.count && place.first + token >= 0 && place.first + token < p.tokens; }

template <class Preset> __device__ __forceinline__ void decode_page(const PagesParams& p) {
  __shared__ typename Preset::Memory m;
  __shared__ int before[PAGES_WARPS];
  const int tid = threadIdx.x, page = blockIdx.x / p.heads, h = blockIdx.x % p.heads, b = blockIdx.y;
  const int* counts = p.counts + b * p.counts_row;
  const int count = min(counts[page], PAGE);
  if (count <= 0) return;
  const i64 block = p.table[b * p.table_row + page];
  Place place = {p.index + block * p.index_stride + (i64)h * INDEX_RECORD, p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD, p.starts[b], count, h};
  Preset::begin(place, p.constants + b * p.constants_row + (i64)h * CONSTANTS, m);
  int sum = 0;                // tokens of the row's pages before
  for (int i = tid; i < page; i += PAGES_THREADS) sum += max(0, min(counts[i], PAGE));
  sum = warp_sum(sum);
  if ((tid & 31) == 0) before[tid >> 5] = sum;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PAGES_WARPS; i++) place.first += before[i];
  if ((tid >> 5) * OWN < count) Preset::decode(p, place, m);
}
