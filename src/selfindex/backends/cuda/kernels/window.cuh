// One decode step over the full-precision tokens of a row (sinks and recent window), a block a
// KV head: stores the new token, attends to all of them, merges the encoded tokens' part by
// log-sum-exp and writes the attention's output in the model's dtype. The tokens lie one behind the
// other, or in the blocks of a serving engine, of which a row has so many that it takes them in parts.
struct WindowParams {
  const void* query;                     // [B, H * G, 1, D], strides in elements, channels dense
  i64 query_row, query_head;
  const void *new_keys, *new_values;     // [B, H, 1, D]
  i64 key_row, key_head, value_row, value_head;
  void *keys, *values;                   // [B, H, room, D], contiguous; of paged ones, of token 0 of block 0
  const int* lengths;                    // [B] tokens held before this step; of paged ones, see below
  const float *part, *part_lse;          // [B, H * G, D] and [B, H * G] of the encoded tokens
  const float* sink;                     // [H * G] logit of a learned sink, or null
  void* out;                             // [B, 1, H * G, D], contiguous
  int heads, room;                       // room: tokens of a part
  float scale;                           // softmax scaling * log2(e)
};

struct PagedWindow {
  const int* table;                      // [B, columns]: where a row's tokens are, block 0 holds none
  const int* starts;                     // [B]: tokens before it, other than sinks, are not here
  i64 block_stride, head_stride;         // in elements; a token is its key and its value, 2 D of them
  int columns, block, sinks;             // from a row of the table to the next; tokens of a block
};

constexpr int VECTORS = D / 32;                                  // of 4 channels, a lane: i * 32 + sub * 4
constexpr int AT_ONCE = D == 64 ? 8 : D == 256 ? 1 : 4;          // heads whose query fits the registers
constexpr int ROW_THREADS = D / 4;                               // threads that read a token's value
constexpr int VALUE_HEADS = G < 4 ? G : 4;
constexpr float LN2 = 0.69314718f, INV_LN2 = 1.44269504f;

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

// A row's tokens, one behind the other.
struct Packed {
  static constexpr bool PARTS = false;
  i64 base;
  int tokens;

  __device__ __forceinline__ Packed(const WindowParams& p, int row) : base((i64)row * p.room * D), tokens(p.lengths[row / p.heads] + 1) {}
  __device__ __forceinline__ i64 newest() const { return base + (i64)(tokens - 1) * D; }
  __device__ __forceinline__ i64 at(int t) const { return base + (i64)t * D; }
};

// In blocks: sinks, then those from a row's start on, which count without a gap. The places of a part's
// tokens are in shared memory.
struct Paged {
  static constexpr bool PARTS = true;
  const PagedWindow& p;
  const int* table;
  i64* places;                                                   // [room]
  i64 head;
  int before, gap, length, tokens;

  __device__ __forceinline__ Paged(const WindowParams& w, const PagedWindow& paged, int row, i64* memory)
      : p(paged), table(paged.table + (i64)(row / w.heads) * paged.columns), places(memory), head(row % w.heads * paged.head_stride) {
    const int start = max(paged.starts[row / w.heads], 0);
    length = w.lengths[row / w.heads];
    before = min(start, paged.sinks);
    gap = start - before;
    tokens = length - gap + 1;
  }
  // -1 where there is none.
  __device__ __forceinline__ i64 place(int position) const {
    const int block = table[position / p.block];
    return block ? block * p.block_stride + head + (i64)(position % p.block) * 2 * D : -1;
  }
  __device__ __forceinline__ i64 newest() const { return place(length); }
  __device__ __forceinline__ void open(int first, int count) const {
    for (int t = threadIdx.x; t < count; t += blockDim.x) places[t] = place(first + t < before ? first + t : first + t + gap);
  }
  __device__ __forceinline__ i64 at(int t) const { return places[t]; }
};

template <int THREADS, class Tokens>
__device__ __forceinline__ void window_row(const WindowParams& p, const Tokens& row_tokens, float* logits, float (*parts)[VALUE_HEADS][D], float* sums) {
  constexpr int WARPS = THREADS / 32, TURNS = THREADS / ROW_THREADS;   // tokens whose values are read side by side
  __shared__ float raw_weight[G], part_weight[G];
  __shared__ float tops[Tokens::PARTS ? G : 1], totals[Tokens::PARTS ? G : 1], shrinking[Tokens::PARTS ? G : 1];
  const int row = blockIdx.x, b = row / p.heads, h = row % p.heads;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5, sub = lane & 7;
  const i64 newest = row_tokens.newest();
  if (!Tokens::PARTS || newest >= 0)
    for (int c = tid; c < D; c += THREADS) {
      copy_element(p.keys, newest + c, p.new_keys, b * p.key_row + h * p.key_head + c);
      copy_element(p.values, newest + c, p.new_values, b * p.value_row + h * p.value_head + c);
    }
  int done = 0;   // tokens of the parts before
  do {
    int tokens = row_tokens.tokens;
    if constexpr (Tokens::PARTS) {
      tokens = min(tokens - done, p.room);
      row_tokens.open(done, tokens);
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
#pragma unroll D == 256 || Tokens::PARTS ? 2 : 4
      for (int start = w * 4; start < tokens; start += WARPS * 4) {
        const int t = start + (lane >> 3);
        const i64 place = row_tokens.at(min(t, tokens - 1)), at = (Tokens::PARTS && place < 0 ? 0 : place) + sub * 4;
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
          if (sub == 0 && t < tokens && first + g < G) logits[(first + g) * p.room + t] = Tokens::PARTS && place < 0 ? FAR : x * p.scale;
        }
      }
    }
    __syncthreads();
    // Values come near while the kernel before, whose part is needed now, finishes.
    if constexpr (Tokens::PARTS) {
      constexpr int LINES = (D + PER_LINE - 1) / PER_LINE;
      for (int i = tid; i < tokens * LINES; i += THREADS) {
        const i64 at = row_tokens.at(i / LINES);
        if (at >= 0) prefetch(p.values, at + i % LINES * PER_LINE);
      }
    } else {
      for (int i = tid * PER_LINE; i < tokens * D; i += THREADS * PER_LINE) prefetch(p.values, row_tokens.at(0) + i);
    }
    wait_previous();
    for (int g = w; g < G; g += WARPS) {
      float* line = logits + g * p.room;
      const i64 head = (i64)b * p.heads * G + h * G + g;
      float top = FAR, total = 0.f;
      for (int t = lane; t < tokens; t += 32) top = fmaxf(top, line[t]);
      const float part = p.part_lse[head] * INV_LN2;
      top = fmaxf(warp_max(top), part);
      if (p.sink) top = fmaxf(top, p.sink[h * G + g] * INV_LN2);
      if (Tokens::PARTS && done) top = fmaxf(top, tops[g]);
      for (int t = lane; t < tokens; t += 32) {
        const float e = Tokens::PARTS && line[t] == FAR ? 0.f : ex2(line[t] - top);
        line[t] = e;
        total += e;
      }
      total = warp_sum(total);
      if constexpr (Tokens::PARTS) {
        const float shrink = done ? ex2(tops[g] - top) : 0.f;
        if (done) total = fmaf(totals[g], shrink, total);
        __syncwarp();
        if (lane == 0) { tops[g] = top; totals[g] = total; shrinking[g] = shrink; }
      }
      const float other = ex2(part - top);
      total += other;
      if (p.sink) total += ex2(p.sink[h * G + g] * INV_LN2 - top);
      if (Tokens::PARTS) total = fmaxf(total, 1e-30f);   // none of the tokens exists
      if (lane == 0) { raw_weight[g] = 1.f / total; part_weight[g] = other / total; }
    }
    __syncthreads();
    const int turn = tid / ROW_THREADS, c = tid % ROW_THREADS * 4;
    for (int first = 0; first < G; first += VALUE_HEADS) {
      if (turn < TURNS) {
        float4 sum[VALUE_HEADS];
#pragma unroll
        for (int g = 0; g < VALUE_HEADS; g++) sum[g] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll Tokens::PARTS ? 8 : 16
        for (int t = turn; t < tokens; t += TURNS) {
          const i64 at = row_tokens.at(t);
          const float4 v = Tokens::PARTS && at < 0 ? make_float4(0.f, 0.f, 0.f, 0.f) : load4(p.values, at + c);
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
        if constexpr (Tokens::PARTS) {
          if (done) x = fmaf(sums[g * D + channel], shrinking[g], x);
          if (done + tokens < row_tokens.tokens) {
            sums[g * D + channel] = x;
            continue;
          }
        }
        const i64 at = ((i64)b * p.heads * G + h * G + g) * D + channel;
        const float part = part_weight[g] > 0.f ? p.part[at] * part_weight[g] : 0.f;
        store_output(p.out, at, fmaf(x, raw_weight[g], part));
      }
      __syncthreads();
    }
    done += tokens;
  } while (Tokens::PARTS && done < row_tokens.tokens);
}

template <int THREADS> __device__ __forceinline__ void packed_row(const WindowParams& p) {
  extern __shared__ __align__(16) float memory[];                // logits [G][room], then probabilities; parts [TURNS]
  auto parts = (float (*)[VALUE_HEADS][D])(memory + (G * p.room + 3) / 4 * 4);
  window_row<THREADS>(p, Packed(p, blockIdx.x), memory, parts, nullptr);
}

template <int THREADS> __device__ __forceinline__ void paged_row(const WindowParams& p, const PagedWindow& paged) {
  extern __shared__ __align__(16) float memory[];                // places [room]; sums [G][D]; then as above
  const int row = blockIdx.x;
  if (p.lengths[row / p.heads] < 0) {
    wait_previous();                                             // it may still read what was where the output is
    for (int i = threadIdx.x; i < G * D; i += THREADS) store_output(p.out, (i64)row * G * D + i, 0.f);
    return;
  }
  float *sums = memory + 2 * p.room, *logits = sums + G * D;
  auto parts = (float (*)[VALUE_HEADS][D])(logits + (G * p.room + 3) / 4 * 4);
  window_row<THREADS>(p, Paged(p, paged, row, (i64*)memory), logits, parts, sums);
}

// Many rows: two blocks on a multiprocessor. Few: enough threads to load all of a window at once.
extern "C" __global__ void __launch_bounds__(256, 2) window256(const __grid_constant__ WindowParams p) { packed_row<256>(p); }
extern "C" __global__ void __launch_bounds__(512, 1) window512(const __grid_constant__ WindowParams p) { packed_row<512>(p); }
extern "C" __global__ void __launch_bounds__(256, 2) window_paged256(const __grid_constant__ WindowParams p, const __grid_constant__ PagedWindow paged) { paged_row<256>(p, paged); }
extern "C" __global__ void __launch_bounds__(512, 1) window_paged512(const __grid_constant__ WindowParams p, const __grid_constant__ PagedWindow paged) { paged_row<512>(p, paged); }
