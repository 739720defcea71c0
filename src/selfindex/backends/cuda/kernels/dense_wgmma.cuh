// Attention of a chunk of queries to every encoded token with Hopper's asynchronous tensor cores, for
// head_dim 64 and 128. Producer warps decode a page after the other into shared memory as fp16
// (level * scale / base; the page's mean is one more key, in the paper preset zero); two groups of consumer warps, 64 query
// rows each, multiply what lies there. Channels lie in the order in which they are decoded: queries
// are stored in the same order, and sums put back into theirs at the end.
#if WGMMA
constexpr int TILE = 128;                              // query rows a block
constexpr int CONSUMERS = 256, PRODUCERS = 256, WGMMA_THREADS = CONSUMERS + PRODUCERS;
constexpr int KEY_ROWS = PAGE + 8;                     // the last 8 are the page's mean
constexpr int QUERY_BYTES = TILE * D * 2, KEY_BYTES = KEY_ROWS * D * 2, VALUE_BYTES = PAGE * D * 2;
constexpr int DECODED = QUERY_BYTES, STAGED = DECODED + 2 * (KEY_BYTES + VALUE_BYTES);

struct PageFacts {                                     // of a decoded page
  int count;
  float key_unit, mean_unit, base_log, base_inverse;
};

__device__ __forceinline__ void multiply_keys(float* c, u64 a, u64 b, int add) {
  asm volatile("{.reg .pred p; setp.ne.b32 p,%70,0;\n"
    "wgmma.mma_async.sync.aligned.m64n136k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67},%68,%69,p,1,1,0,0;}"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]) : "l"(a), "l"(b), "r"(add)); }
#if D == 64
__device__ __forceinline__ void multiply_values(float* c, const uint4& a, u64 b) {
  asm volatile("{.reg .pred p; setp.ne.b32 p,%37,0;\n"
    "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},{%32,%33,%34,%35},%36,p,1,1,1;}"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(1)); }
#else
__device__ __forceinline__ void multiply_values(float* c, const uint4& a, u64 b) {
  asm volatile("{.reg .pred p; setp.ne.b32 p,%69,0;\n"
    "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},{%64,%65,%66,%67},%68,p,1,1,1;}"
    : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(1)); }
#endif
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory"); }
// Operand in shared memory, swizzled rows of 128 bytes (64 channels): groups of 8 rows are 1024
// bytes apart, the next 64 channels `slice` bytes.
__device__ __forceinline__ u64 operand(const u8* at, int slice) {
  return (u64)(shared_address(at) >> 4 & 0x3fff) | (u64)(slice >> 4) << 16 | (u64)(1024 >> 4) << 32 | 1ull << 62; }
// Byte of 8 channels (unit) of a row in such an operand of `rows` rows.
__device__ __forceinline__ int swizzled(int row, int unit, int rows) {
  return (unit >> 3) * rows * 128 + row * 128 + ((unit ^ row) & 7) * 16; }
__device__ __forceinline__ void init_barrier(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" :: "r"(shared_address(barrier)), "r"(arrivals) : "memory"); }
__device__ __forceinline__ void wait_barrier(u64* barrier, int phase) {
  asm volatile("{.reg .pred p;\nagain: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n@!p bra again;}"
    :: "r"(shared_address(barrier)), "r"(phase) : "memory"); }
__device__ __forceinline__ void arrive_barrier(u64* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" :: "r"(shared_address(barrier)) : "memory"); }

// Where `levels` of `places` put channel c, and its inverse.
__device__ __forceinline__ int decoded_place(int c) { return (c & ~15) + (c & 1) * 8 + c % 16 / 8 * 4 + c % 8 / 2; }
__device__ __forceinline__ int value_channel(int place) {
  const int n = place % 16;
  return place - n + (VALUE_BITS == 3 ? (n / 4 & 1) * 8 + n / 8 + n % 4 * 2 : n / 2 + (n & 1) * 8); }

#if PAPER
// Levels of 16 channels over the table of their 32.
__device__ __forceinline__ void table_levels(uint4* to, u32 magnitudes, u32 signs, bool upper, const LevelTable& table) {
  u32 at[2];
  places(at, magnitudes, signs, upper);
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    levels(at[odd], to[odd].x, to[odd].y, table);
    levels(at[odd] >> 16, to[odd].z, to[odd].w, table);
  }
}
#else
// Levels of 16 channels over their table, times a scale.
__device__ __forceinline__ void scaled_levels(uint4* to, u32 magnitudes, u32 signs, bool upper, u32 scale) {
  u32 at[2];
  places(at, magnitudes, signs, upper);
#pragma unroll
  for (int odd = 0; odd < 2; odd++) {
    u32 x[4];
    levels(at[odd], x[0], x[1]);
    levels(at[odd] >> 16, x[2], x[3]);
    to[odd] = make_uint4(multiply_halves(x[0], scale), multiply_halves(x[1], scale), multiply_halves(x[2], scale), multiply_halves(x[3], scale));
  }
}
#endif

__device__ __forceinline__ void swap(u32& a, u32& b) { const u32 c = a; a = b; b = c; }

// Quarters 2 and 3 of a token's 128 channels store their second half first: a warp's stores then
// meet all banks.
__device__ __forceinline__ int turn_halves(int quarter, u32* codes, u32* signs) {
#if D == 128
  if (quarter & 2) { swap(codes[0], codes[1]); signs[0] = prmt(signs[0], 0, 0x1032); }
  return quarter >> 1;
#else
  return 0;
#endif
}

// Decode the keys and the mean of a staged page: [KEY_ROWS, D].
__device__ __forceinline__ void decode_keys(const u8* index, u8* keys, int tid) {
  const u8* payload = index + INDEX_RECORD;
  const int quarter = tid & 3;                         // of a token's channels
  for (int token = tid >> 2; token < PAGE; token += PRODUCERS / 4) {
    u32 codes[KEY_WORDS], signs[SIGN_WORDS];
    load_bytes<2 * R>(codes, payload + token * TOKEN + 2 * R * quarter);
    load_bytes<R>(signs, index + token * CODE + R * quarter);
#if PAPER
    const LevelTable table = level_table(payload, token, quarter * R / 4);
#else
    const u32 scale = index[KEY_SCALES + token] * 0x00400040u;
#endif
    const int turned = turn_halves(quarter, codes, signs);
#pragma unroll
    for (int word = 0; word < KEY_WORDS; word++) {
      const int unit = 2 * (quarter * KEY_WORDS + (word ^ turned));
      uint4 x[2];
#if PAPER
      table_levels(x, codes[word], signs[word / 2], word & 1, table);
#else
      scaled_levels(x, codes[word], signs[word / 2], word & 1, scale);
#endif
      *(uint4*)(keys + swizzled(token, unit, KEY_ROWS)) = x[0];
      *(uint4*)(keys + swizzled(token, unit + 1, KEY_ROWS)) = x[1];
    }
  }
  for (int c = tid; c < D; c += PRODUCERS) {
    const int place = decoded_place(c);
#if PAPER
    const u16 mean = 0;
#else
    const u16 mean = (u16)float_to_half((float)(signed char)index[MEAN + c]);
#endif
#pragma unroll
    for (int row = PAGE; row < KEY_ROWS; row++) *(u16*)(keys + swizzled(row, place / 8, KEY_ROWS) + place % 8 * 2) = mean;
  }
}

// Decode the values of a staged page: [PAGE, D], over base; `ratio` is that of the scales' base to it.
__device__ __forceinline__ void decode_values(const u8* payload, u8* values, int tid, float ratio) {
  const int quarter = tid & 3;
  for (int token = tid >> 2; token < PAGE; token += PRODUCERS / 4) {
    u32 codes[KEY_WORDS], signs[SIGN_WORDS] = {};
    load_bytes<2 * R>(codes, payload + token * TOKEN + D / 4 + 2 * R * quarter);
#if VALUE_BITS == 3
    load_bytes<R>(signs, payload + token * TOKEN + D / 2 + R * quarter);
#endif
#if PAPER
    const u32 line = value_line(payload, token, quarter * R / 4, ratio);
    const u32 scale = prmt(line, 0, 0x1010), centre = prmt(line, 0, 0x3232);
#else
    const u32 scale = float_to_half(scale_of(payload[VALUE_SCALES + token]) * ratio) * 0x00010001u;
#endif
    const int turned = turn_halves(quarter, codes, signs);
#pragma unroll
    for (int word = 0; word < KEY_WORDS; word++) {
      const int unit = 2 * (quarter * KEY_WORDS + (word ^ turned));
      uint4 x[2];
#if VALUE_BITS == 3
      scaled_levels(x, codes[word], signs[word / 2], word & 1, scale);
#else
      u32 y[8];
      code_pairs(y, codes[word]);                      // channels c and c + 8
#pragma unroll
      for (int c = 0; c < 8; c++)
#if PAPER
        y[c] = fma_halves(y[c], scale, centre);
#else
        y[c] = multiply_halves(y[c], scale);
#endif
      x[0] = make_uint4(y[0], y[1], y[2], y[3]);
      x[1] = make_uint4(y[4], y[5], y[6], y[7]);
#endif
      *(uint4*)(values + swizzled(token, unit, PAGE)) = x[0];
      *(uint4*)(values + swizzled(token, unit + 1, PAGE)) = x[1];
    }
  }
}

extern "C" __global__ void __launch_bounds__(WGMMA_THREADS, 1) decode_all_wgmma(const __grid_constant__ DenseParams p) {
  extern __shared__ __align__(16) u8 unaligned[];
  u8* memory = unaligned + (-shared_address(unaligned) & 1023);
  __shared__ float reduce[WGMMA_THREADS / 32];
  __shared__ PageFacts facts[2];
#if PAPER
  __shared__ float bounds[PAGE / 32];
#endif
  // Of keys and values by stage: decoded, and no longer needed.
  __shared__ u64 full_keys[2], full_values[2], empty_keys[2], empty_values[2];
  __shared__ int last;
  const int tid = threadIdx.x, lane = tid & 31, w = tid >> 5;
  const int split = blockIdx.x % p.splits, first = blockIdx.x / p.splits * TILE;
  const int b = blockIdx.y / p.heads, h = blockIdx.y % p.heads;
  const int* counts = p.counts + (i64)b * p.pages;
  const auto next_page = [&](int page) {
    do page += p.splits; while (page < last && counts[page] <= 0);
    return page;
  };
  if (tid == 0) {
    last = 0;
    for (int i = 0; i < 2; i++) {
      init_barrier(&full_keys[i], PRODUCERS);
      init_barrier(&full_values[i], PRODUCERS);
      init_barrier(&empty_keys[i], CONSUMERS / 32);
      init_barrier(&empty_values[i], CONSUMERS / 32);
    }
  }
  __syncthreads();
  int used = 0;                                        // pages up to the last one with tokens
  for (int i = split + tid * p.splits; i < p.pages; i += WGMMA_THREADS * p.splits) used = counts[i] > 0 ? i + 1 : used;
  used = __reduce_max_sync(~0u, used);
  if (lane == 0) atomicMax(&last, used);
  const float unit = KEY_GAIN * p.scale * load_queries<TILE, WGMMA_THREADS / 32>(p, first, nullptr, reduce, [&](int row, int c, u16 value) {
    const int place = decoded_place(c);
    *(u16*)(memory + swizzled(row, place / 8, TILE) + place % 8 * 2) = value;
  });
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  allow_next();
  int page = next_page(split - p.splits);

  if (tid >= CONSUMERS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(PRODUCERS == 128 ? 88 : 72));
    const int id = tid - CONSUMERS;
    const auto start_copy = [&](int page, int stage) {
      const i64 block = p.table[(i64)b * p.pages + page];
      const u8* index = p.index + block * p.index_stride + (i64)h * INDEX_RECORD;
      const u8* payload = p.payload + block * p.payload_stride + (i64)h * PAYLOAD_RECORD;
      u8* to = memory + STAGED + stage * STAGE;
      for (int i = id; i < INDEX_RECORD / 16; i += PRODUCERS) copy_async(to + i * 16, index + i * 16);
      for (int i = id; i < PAYLOAD_RECORD / 16; i += PRODUCERS) copy_async(to + INDEX_RECORD + i * 16, payload + i * 16);
    };
    if (page < last) start_copy(page, 0);
    for (int n = 0; page < last; n++) {
      const int stage = n & 1, count = min(counts[page], PAGE);
      page = next_page(page);
      asm volatile("cp.async.wait_all;" ::: "memory");
      asm volatile("bar.sync 1,%0;" :: "n"(PRODUCERS) : "memory");
      if (page < last) start_copy(page, stage ^ 1);
      const u8* index = memory + STAGED + stage * STAGE;
#if PAPER
      if (id < PAGE) {
        const float bound = warp_max(value_bound(index + INDEX_RECORD, id));
        if (lane == 0) bounds[id / 32] = bound;
      }
      asm volatile("bar.sync 1,%0;" :: "n"(PRODUCERS) : "memory");
      float base = bounds[0];
#pragma unroll
      for (int i = 1; i < PAGE / 32; i++) base = fmaxf(base, bounds[i]);
      const float key_unit = unit, mean_unit = 0.f, ratio = 1.f / base;
#else
      const float* consts = (const float*)(index + CONSTS);
      const float base = fmaxf(consts[2], 1e-20f), key_unit = consts[1] * LEVEL_UNIT * unit, mean_unit = consts[0] * unit, ratio = consts[2] / base;
#endif
      u8* keys = memory + DECODED + stage * (KEY_BYTES + VALUE_BYTES);
      wait_barrier(&empty_keys[stage], (n >> 1 & 1) ^ 1);
      if (id == 0) facts[stage] = {count, fmaxf(key_unit, 1e-25f), mean_unit, lg2(base), 1.f / base};
      decode_keys(index, keys, id);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive_barrier(&full_keys[stage]);
      wait_barrier(&empty_values[stage], (n >> 1 & 1) ^ 1);
      decode_values(index + INDEX_RECORD, keys + KEY_BYTES, id, ratio);
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      arrive_barrier(&full_values[stage]);
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(PRODUCERS == 128 ? 208 : 184));
  const int j = lane & 3, g = lane >> 2, group = w >> 2;
  float sum[D / 2], x[68], top[2] = {FAR, FAR}, total[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 2; i++) sum[i] = 0.f;
  const u64 query = operand(memory + group * 64 * 128, 0);
  const auto multiply_page_keys = [&](const u8* keys) {
    const u64 key = operand(keys, 0);
#pragma unroll
    for (int step = 0; step < D / 16; step++)
      multiply_keys(x, query + (step / 4 * TILE * 128 + step % 4 * 32) / 16, key + (step / 4 * KEY_ROWS * 128 + step % 4 * 32) / 16, step > 0);
  };
  // The groups take turns: one multiplies while the other computes probabilities.
  const auto take_turn = [&] { asm volatile("bar.sync %0,%1;" :: "r"(3 + group), "n"(CONSUMERS) : "memory"); };
  const auto pass_turn = [&] { asm volatile("bar.arrive %0,%1;" :: "r"(4 - group), "n"(CONSUMERS) : "memory"); };
  if (page < last) {
    if (group == 1) pass_turn();
    take_turn();
    wait_barrier(&full_keys[0], 0);
    begin_products();
    multiply_page_keys(memory + DECODED);
    end_products();
    pass_turn();
  }
  for (int n = 0; page < last; n++) {
    const int stage = n & 1;
    page = next_page(page);
    const u8* decoded = memory + DECODED + stage * (KEY_BYTES + VALUE_BYTES);
    const PageFacts fact = facts[stage];
    __syncwarp();
    if (lane == 0) arrive_barrier(&empty_keys[stage]);
    if (fact.count < PAGE)
#pragma unroll
      for (int i = 0; i < 64; i++) if (i / 4 * 8 + 2 * j + (i & 1) >= fact.count) x[i] = FAR;
    float shift[2], peak[2] = {FAR, FAR};
#pragma unroll
    for (int i = 0; i < 64; i++) peak[i >> 1 & 1] = fmaxf(peak[i >> 1 & 1], x[i]);
    bool grows = false;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      shift[r] = fmaf(x[64 + 2 * r], fact.mean_unit, fact.base_log);
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 1));
      peak[r] = fmaxf(peak[r], __shfl_xor_sync(~0u, peak[r], 2));
      peak[r] = fmaf(peak[r], fact.key_unit, shift[r]);
      grows |= peak[r] > top[r] + SLACK;
    }
    if (__any_sync(~0u, grows))
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float higher = fmaxf(top[r], peak[r]), factor = ex2(top[r] - higher);
        top[r] = higher;
        total[r] *= factor;
#pragma unroll
        for (int t = 0; t < D / 8; t++) { sum[4 * t + 2 * r] *= factor; sum[4 * t + 2 * r + 1] *= factor; }
      }
    float page_total[2] = {0.f, 0.f};
    uint4 weights[8];
    shift[0] -= top[0];
    shift[1] -= top[1];
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float e[8];
#pragma unroll
      for (int k = 0; k < 8; k++) {
        e[k] = ex2(fmaf(x[8 * i + k], fact.key_unit, shift[k >> 1 & 1]));
        page_total[k >> 1 & 1] += e[k];
      }
      weights[i] = make_uint4(halves(e[0], e[1]), halves(e[2], e[3]), halves(e[4], e[5]), halves(e[6], e[7]));
    }
    total[0] = fmaf(page_total[0], fact.base_inverse, total[0]);
    total[1] = fmaf(page_total[1], fact.base_inverse, total[1]);
    take_turn();
    wait_barrier(&full_values[stage], n >> 1 & 1);
    const u64 value = operand(decoded + KEY_BYTES, PAGE * 128);
    begin_products();
#pragma unroll
    for (int step = 0; step < 8; step++) multiply_values(sum, weights[step], value + step * 16 * 128 / 16);
    end_products();
    if (lane == 0) arrive_barrier(&empty_values[stage]);
    if (page < last) wait_barrier(&full_keys[stage ^ 1], n + 1 >> 1 & 1);
    begin_products();
    // Keys of the next page; after the last one, of what lies there, for nothing.
    multiply_page_keys(memory + DECODED + (stage ^ 1) * (KEY_BYTES + VALUE_BYTES));
    end_products();
    if (page < last || group == 0) pass_turn();
  }
  asm volatile("bar.sync 2,%0;" :: "n"(CONSUMERS) : "memory");        // pages make room for the sums
  float* mine = (float*)(memory + DECODED) + w * 16 * PART;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float* to = mine + (g + 8 * r) * PART;
#pragma unroll
    for (int t = 0; t < D / 8; t++) {
      to[value_channel(8 * t + 2 * j)] = sum[4 * t + 2 * r];
      to[value_channel(8 * t + 2 * j + 1)] = sum[4 * t + 2 * r + 1];
    }
    float all = total[r];
    all += __shfl_xor_sync(~0u, all, 1);
    all += __shfl_xor_sync(~0u, all, 2);
    if (j == 0) { to[D] = top[r]; to[D + 1] = all; }
  }
  __syncwarp();
  for (int i = 0; i < 16; i++) {
    const int row = first + w * 16 + i;
    if (row >= p.groups * p.queries) break;
    float y[R];
#pragma unroll
    for (int r = 0; r < R; r++) y[r] = mine[i * PART + r * 32 + lane];
    store_row(p, y, mine[i * PART + D], mine[i * PART + D + 1], row, split, nullptr);
  }
}
#endif
