// Mean and half the variance of every channel of blocks of 128 keys (operators/select_blocks.py), a thread block
// each: keys are read once, into registers, and sums are added in a fixed order.
constexpr int MOMENTS_THREADS = 256, KEYS = 128;
constexpr int GROUPS = D / 4, AT_ONCE = MOMENTS_THREADS / GROUPS, LOADS = (KEYS + AT_ONCE - 1) / AT_ONCE;

struct MomentsParams {
  const void* keys;                                    // [B, H, tokens, D], strides in elements, channels dense
  i64 key_row, key_head, key_token;
  float* moments;                                      // [B, H, blocks, 2 D]: means, then half the variances
  int heads, tokens, blocks;
};

// Sums over the tokens that threads have of the same four channels.
__device__ __forceinline__ float4 total(float (*sums)[D], float4 own, int place, int group) {
  __syncthreads();                                     // of sums that were there before
  if (place < AT_ONCE) *(float4*)&sums[place][4 * group] = own;
  __syncthreads();
  float4 all = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const float4 part = *(const float4*)&sums[i][4 * group];
    all.x += part.x; all.y += part.y; all.z += part.z; all.w += part.w;
  }
  return all;
}

extern "C" __global__ void __launch_bounds__(MOMENTS_THREADS) moments(const __grid_constant__ MomentsParams p) {
  __shared__ __align__(16) float sums[AT_ONCE][D];
  const int tid = threadIdx.x, place = tid / GROUPS, group = tid % GROUPS;
  const int block = blockIdx.x % p.blocks, h = blockIdx.x / p.blocks, b = blockIdx.y;
  const i64 base = b * p.key_row + h * p.key_head + 4 * group;
  float4 x[LOADS], sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const int key = place + i * AT_ONCE;
    // The last token fills up a block that is not full; what is beyond a block counts for nothing below.
    x[i] = load4(p.keys, base + (i64)min(block * KEYS + min(key, KEYS - 1), p.tokens - 1) * p.key_token);
  }
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (place + i * AT_ONCE < KEYS) { sum.x += x[i].x; sum.y += x[i].y; sum.z += x[i].z; sum.w += x[i].w; }
  float4 mean = total(sums, sum, place, group);
  mean.x /= KEYS; mean.y /= KEYS; mean.z /= KEYS; mean.w /= KEYS;
  sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
  for (int i = 0; i < LOADS; i++)
    if (place + i * AT_ONCE < KEYS) {
      const float a = x[i].x - mean.x, c = x[i].y - mean.y, e = x[i].z - mean.z, f = x[i].w - mean.w;
      sum.x += a * a; sum.y += c * c; sum.z += e * e; sum.w += f * f;
    }
  const float4 squares = total(sums, sum, place, group);
  if (place) return;
  constexpr float HALF = .5f / KEYS;
  float* to = p.moments + ((i64)(b * p.heads + h) * p.blocks + block) * (2 * D) + 4 * group;
  *(float4*)to = mean;
  *(float4*)(to + D) = make_float4(squares.x * HALF, squares.y * HALF, squares.z * HALF, squares.w * HALF);
}
