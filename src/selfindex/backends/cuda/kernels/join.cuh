// Attention over up to four disjoint sets of keys becomes attention over their union, in the model's dtype
// or float32; 8 channels a thread. A learned sink takes probability and has no value.
constexpr int JOIN_THREADS = 256, MOST_PARTS = 4, VECTORS = D / 8;

struct Part {
  const void* out;            // [B, H, T, D], strides in elements
  i64 out_row, out_head, out_token;
  const float* lse;           // [B, H, T]
  i64 lse_row, lse_head, lse_token;
  int whole;                  // float32, not the model's dtype
};
struct JoinParams {
  Part part[MOST_PARTS];
  const float* sink;          // [H], or null
  void* out;
  i64 out_row, out_head, out_token;
  float* lse;                 // [B, T, H], of the parts and the sink
  int parts, heads, queries, whole;
  unsigned int threads;       // of all rows
};

__device__ __forceinline__ void load8(float* x, const void* from, i64 at, int whole) {
  if (IN_TYPE == 0 || whole) {
    const float4 a = *(const float4*)((const float*)from + at), b = *(const float4*)((const float*)from + at + 4);
    x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
  } else {
    const float4 a = load4(from, at), b = load4(from, at + 4);
    x[0] = a.x; x[1] = a.y; x[2] = a.z; x[3] = a.w; x[4] = b.x; x[5] = b.y; x[6] = b.z; x[7] = b.w;
  }
}

extern "C" __global__ void __launch_bounds__(JOIN_THREADS) join(const __grid_constant__ JoinParams p) {
  const u32 id = blockIdx.x * JOIN_THREADS + threadIdx.x;
  if (id >= p.threads) return;
  const u32 row = id / VECTORS, c = id % VECTORS * 8;
  const i64 h = row % p.heads, t = row / p.heads % p.queries, b = row / p.heads / p.queries;
  float lse[MOST_PARTS], weight[MOST_PARTS], best = p.sink ? p.sink[h] : FAR, total;
#pragma unroll
  for (int i = 0; i < MOST_PARTS; i++) {
    const Part& part = p.part[i];
    lse[i] = i < p.parts ? part.lse[b * part.lse_row + h * part.lse_head + t * part.lse_token] : 2.f * FAR;
    best = fmaxf(best, lse[i]);
  }
  total = p.sink ? ex2((p.sink[h] - best) * 1.44269504f) : 0.f;
#pragma unroll
  for (int i = 0; i < MOST_PARTS; i++) {
    weight[i] = ex2((lse[i] - best) * 1.44269504f);   // 0 for parts without a key
    total += weight[i];
  }
  const float gain = total > 0.f ? 1.f / total : 0.f;
  float sum[8] = {};
#pragma unroll
  for (int i = 0; i < MOST_PARTS; i++) {
    if (weight[i] == 0.f) continue;                   // whatever is there
    const Part& part = p.part[i];
    float x[8];
    load8(x, part.out, b * part.out_row + h * part.out_head + t * part.out_token + c, part.whole);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] = fmaf(weight[i] * gain, x[j], sum[j]);
  }
  const i64 to = b * p.out_row + h * p.out_head + t * p.out_token + c;
  if (IN_TYPE == 0 || p.whole) {
    float* out = (float*)p.out + to;
    *(float4*)out = make_float4(sum[0], sum[1], sum[2], sum[3]);
    *(float4*)(out + 4) = make_float4(sum[4], sum[5], sum[6], sum[7]);
  } else {
    u32 pair[4];
#pragma unroll
    for (int j = 0; j < 4; j++)
#if IN_TYPE == 1
      pair[j] = halves(sum[2 * j], sum[2 * j + 1]);
#else
      asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair[j]) : "f"(sum[2 * j + 1]), "f"(sum[2 * j]));
#endif
    *(uint4*)((u16*)p.out + to) = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }
  if (c == 0) p.lse[row] = total > 0.f ? best + lg2(total) * 0.69314718f : -__int_as_float(0x7f800000);
}
