// One decode step over the full-precision tokens of a row (sinks and recent window), a block a
// KV head: stores the new token, attends to all of them, merges the encoded tokens' part by
// log-sum-exp and writes the attention's output in the model's dtype.
struct WindowParams {
  const void* query;                     // [B, H * G, 1, D], strides in elements, channels dense
  i64 query_row, query_head;
  const void *new_keys, *new_values;     // [B, H, 1, D]
  i64 key_row, key_head, value_row, value_head;
  void *keys, *values;                   // [B, H, room, D], contiguous
  const int* lengths;                    // [B] tokens held before this step
  const float *part, *part_lse;          // [B, H * G, D] and [B, H * G] of the encoded tokens
  const float* sink;                     // [H * G] logit of a learned sink, or null
  void* out;                             // [B, 1, H * G, D], contiguous
  int heads, room;
  float scale;                           // softmax scaling * log2(e)
};

constexpr int VECTORS = D / 32;                                  // of 4 channels, a lane: i * 32 + sub * 4
constexpr int AT_ONCE = D == 64 ? 8 : D == 256 ? 1 : 4;          // heads whose query fits the registers
constexpr int ROW_THREADS = D / 4;                               // threads that read a token's value
constexpr int VALUE_HEADS = G < 4 ? G : 4;
constexpr float LN2 = 0.69314718f, INV_LN2 = 1.44269504f;

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
__device__ __forceinline__ void copy_element(void* to, i64 at, const void* from, i64 i) {
#if IN_TYPE == 0
  ((float*)to)[at] = ((const float*)from)[i];
#else
  ((u16*)to)[at] = ((const u16*)from)[i];
#endif
}
__device__ __forceinline__ void store_output(void* to, i64 at, float x) {
#if IN_TYPE == 0
  ((float*)to)[at] = x;
#elif IN_TYPE == 1
  ((u16*)to)[at] = (u16)float_to_half(x);
#else
  u16 h; asm("cvt.rn.bf16.f32 %0,%1;" : "=h"(h) : "f"(x));
  ((u16*)to)[at] = h;
#endif
}

// The line of memory with this element comes into the L2 cache.
constexpr int PER_LINE = IN_TYPE == 0 ? 32 : 64;   // elements
__device__ __forceinline__ void prefetch(const void* p, i64 i) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"((const u8*)p + i * (128 / PER_LINE))); }

template <int THREADS> __device__ __forceinline__ void window_row(const WindowParams& p) {
  constexpr int WARPS = THREADS / 32, TURNS = THREADS / ROW_THREADS;   // tokens whose values are read side by side
  extern __shared__ __align__(16) float logits[];                // [G][room]; then probabilities
  float (*parts)[VALUE_HEADS][D] = (float (*)[VALUE_HEADS][D])(logits + (G * p.room + 3) / 4 * 4);   // [TURNS]
  __shared__ float raw_weight[G], part_weight[G];
  const int row = blockIdx.x, b = row / p.heads, h = row % p.heads;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, sub = lane & 7;
  const int held = p.lengths[b], tokens = held + 1;
  const i64 base = (i64)row * p.room * D;
  for (int c = tid; c < D; c += THREADS) {
    copy_element(p.keys, base + (i64)held * D + c, p.new_keys, b * p.key_row + h * p.key_head + c);
    copy_element(p.values, base + (i64)held * D + c, p.new_values, b * p.value_row + h * p.value_head + c);
  }
  __syncthreads();
  // Eight lanes a token, four tokens a warp.
  for (int first = 0; first < G; first += AT_ONCE) {
    float4 q[AT_ONCE][VECTORS];
#pragma unroll
    for (int g = 0; g < AT_ONCE; g++)
#pragma unroll
      for (int i = 0; i < VECTORS; i++)
        q[g][i] = load4(p.query, b * p.query_row + (i64)(h * G + min(first + g, G - 1)) * p.query_head + i * 32 + sub * 4);
#pragma unroll D == 256 ? 2 : 4
    for (int start = w * 4; start < tokens; start += WARPS * 4) {
      const int t = start + (lane >> 3);
      const i64 at = base + (i64)min(t, held) * D + sub * 4;
      float4 k[VECTORS];
#pragma unroll
      for (int i = 0; i < VECTORS; i++) k[i] = load4(p.keys, at + i * 32);
#pragma unroll
      for (int g = 0; g < AT_ONCE; g++) {
        float x = 0.f;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
          x = fmaf(q[g][i].x, k[i].x, fmaf(q[g][i].y, k[i].y, fmaf(q[g][i].z, k[i].z, fmaf(q[g][i].w, k[i].w, x))));
        x += __shfl_xor_sync(~0u, x, 1);
        x += __shfl_xor_sync(~0u, x, 2);
        x += __shfl_xor_sync(~0u, x, 4);
        if (sub == 0 && t < tokens && first + g < G) logits[(first + g) * p.room + t] = x * p.scale;
      }
    }
  }
  __syncthreads();
  // Values come near while the kernel before, whose part is needed now, finishes.
  for (int i = tid * PER_LINE; i < tokens * D; i += THREADS * PER_LINE) prefetch(p.values, base + i);
  wait_previous();
  for (int g = w; g < G; g += WARPS) {
    float* line = logits + g * p.room;
    const i64 head = (i64)b * p.heads * G + h * G + g;
    float top = FAR, total = 0.f;
    for (int t = lane; t < tokens; t += 32) top = fmaxf(top, line[t]);
    const float part = p.part_lse[head] * INV_LN2;
    top = fmaxf(warp_max(top), part);
    if (p.sink) top = fmaxf(top, p.sink[h * G + g] * INV_LN2);
    for (int t = lane; t < tokens; t += 32) { const float e = ex2(line[t] - top); line[t] = e; total += e; }
    total = warp_sum(total);
    const float other = ex2(part - top);
    total += other;
    if (p.sink) total += ex2(p.sink[h * G + g] * INV_LN2 - top);
    if (lane == 0) { raw_weight[g] = 1.f / total; part_weight[g] = other / total; }
  }
  __syncthreads();
  const int turn = tid / ROW_THREADS, c = tid % ROW_THREADS * 4;
  for (int first = 0; first < G; first += VALUE_HEADS) {
    if (turn < TURNS) {
      float4 sum[VALUE_HEADS];
#pragma unroll
      for (int g = 0; g < VALUE_HEADS; g++) sum[g] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 16
      for (int t = turn; t < tokens; t += TURNS) {
        const float4 v = load4(p.values, base + (i64)t * D + c);
#pragma unroll
        for (int g = 0; g < VALUE_HEADS; g++) {
          const float weight = logits[min(first + g, G - 1) * p.room + t];
          sum[g].x = fmaf(weight, v.x, sum[g].x); sum[g].y = fmaf(weight, v.y, sum[g].y);
          sum[g].z = fmaf(weight, v.z, sum[g].z); sum[g].w = fmaf(weight, v.w, sum[g].w);
        }
      }
#pragma unroll
      for (int g = 0; g < VALUE_HEADS; g++) *(float4*)&parts[turn][g][c] = sum[g];
    }
    __syncthreads();
    for (int i = tid; i < VALUE_HEADS * D; i += THREADS) {
      const int g = first + i / D, channel = i % D;
      if (g >= G) continue;
      float x = 0.f;
#pragma unroll
      for (int s = 0; s < TURNS; s++) x += parts[s][i / D][channel];
      const i64 at = ((i64)b * p.heads * G + h * G + g) * D + channel;
      const float part = part_weight[g] > 0.f ? p.part[at] * part_weight[g] : 0.f;
      store_output(p.out, at, fmaf(x, raw_weight[g], part));
    }
    __syncthreads();
  }
}

// Many rows: two blocks on a multiprocessor. Few: enough threads to load all of a window at once.
extern "C" __global__ void __launch_bounds__(256, 2) window256(const __grid_constant__ WindowParams p) { window_row<256>(p); }
extern "C" __global__ void __launch_bounds__(512, 1) window512(const __grid_constant__ WindowParams p) { window_row<512>(p); }
