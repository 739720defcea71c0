// The balanced preset. Levels are whole numbers, so that rotating them back is exact in integers: a word
// has a key's in its lower half and a value's in the upper one, as the sum of both, and one transform serves
// both. No sum exceeds 114 * 256, which is less than half a word's range.
//   key = (R_1^T (level scale / 53 + mean step)) / s,    value = R_2^T (level scale)
constexpr u32 NEGATIVE = 0x8EB9D8F3u, POSITIVE = 0x7247280Du;   // bytes of -+13, 40, 71, 114
constexpr u32 EVEN = 0x0301FFFDu;                               // and of 2 code - 3
constexpr float VALUE_UNIT = VALUE_BITS == 3 ? LEVEL_UNIT : 0.5f;

struct Balanced {
  struct Memory {
    float key[D], value[D];   // factors of a channel: sign of the rotation, balance, gain
    int mean[D];              // rotated back
#if D == 96
    int line[PAGES_WARPS][LINE];
#endif
  };
  static __device__ __forceinline__ void begin(const Place& place, const float* constants, Memory& m);
  static __device__ __forceinline__ void decode(const PagesParams& p, const Place& place, Memory& m);
};

// Byte i of x with its sign; the same in the upper half of a word.
__device__ __forceinline__ int lower(u32 x, int i) { return (int)prmt(x, 0, 0x8880 + 0x1111 * i); }
__device__ __forceinline__ u32 upper(u32 x, int i) { return prmt(x, 0, 0x8044 + 0x1100 * i); }
__device__ __forceinline__ int key_of(int p) { return (int)(short)p; }
__device__ __forceinline__ int value_of(int p) { return (p - (int)(short)p) >> 16; }

#if D != 96
// H^T, of AT_ONCE vectors a warp; channels as `channel_of` has them.
__device__ __forceinline__ void rotate_back_slices(int* x, int lane) {
#pragma unroll
  for (int m = 1; m < 16; m <<= 1)
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (!(i & m)) {
        const int a = x[i], b = x[i | m];
        x[i] = a + b;
        x[i | m] = a - b;
      }
#pragma unroll
  for (int m = 1; m < LANES; m <<= 1) {
    const int flip = lane & m ? -1 : 0;
#pragma unroll
    for (int i = 0; i < 16; i++) {
      const int other = __shfl_xor_sync(~0u, x[i], m);
      x[i] = other + ((x[i] ^ flip) - flip);
    }
  }
}
#endif

__device__ __forceinline__ void Balanced::begin(const Place& place, const float* constants, Memory& m) {
  const int tid = threadIdx.x, lane = tid & 31;
  if (tid < D) {
    m.key[tid] = sign_of(tid, 1) * rotation_gain() / constants[tid];
    m.value[tid] = sign_of(tid, 2) * rotation_gain();
  }
  if (tid >= PAGES_THREADS - 32) {
#if D == 96
    int x[3];
#pragma unroll
    for (int r = 0; r < 3; r++) x[r] = (signed char)place.index[MEAN + r * 32 + lane];
    rotate_back(x, lane, m.line[PAGES_WARPS - 1]);
#pragma unroll
    for (int r = 0; r < 3; r++) m.mean[r * 32 + lane] = x[r];
#else
    const int slice = lane % LANES;
    int x[16];
#pragma unroll
    for (int i = 0; i < 16; i++) x[i] = (signed char)place.index[MEAN + channel_of(slice, i)];
    rotate_back_slices(x, lane);
#pragma unroll
    for (int i = 0; i < 16; i++) if (lane < LANES) m.mean[channel_of(slice, i)] = x[i];
#endif
  }
}

#if D == 96
__device__ __forceinline__ void Balanced::decode(const PagesParams& p, const Place& place, Memory& m) {
  const int lane = threadIdx.x & 31, w = threadIdx.x >> 5;
  const float* consts = (const float*)(place.index + CONSTS);
  const float step = consts[0], key_base = consts[1] * LEVEL_UNIT, value_base = consts[2] * VALUE_UNIT;
  for (int token = w * OWN; token < min((w + 1) * OWN, place.count); token++) {
    int x[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int c = r * 32 + lane;
      const u8* codes = place.payload + token * TOKEN;
      const u32 key = (codes[c / 4] >> c % 4 * 2 & 3) | (place.index[token * CODE + c / 8] >> c % 8 & 1) << 2;
      u32 value = codes[D / 4 + c / 4] >> c % 4 * 2 & 3;
#if VALUE_BITS == 3
      value |= (codes[D / 2 + c / 8] >> c % 8 & 1) << 2;
      const u32 level = prmt(NEGATIVE, POSITIVE, value);
#else
      const u32 level = prmt(EVEN, 0, value);
#endif
      x[r] = lower(prmt(NEGATIVE, POSITIVE, key), 0) + (int)upper(level, 0);
    }
    rotate_back(x, lane, m.line[w]);
    if (!fits(p, place, token)) continue;
    const float key_scale = scale_of(place.index[KEY_SCALES + token]) * key_base, value_scale = scale_of(place.payload[VALUE_SCALES + token]) * value_base;
    const i64 to = place.first + token;
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int c = r * 32 + lane;
      store_channel(p.keys, place.head * p.key_head + to * p.key_token + c, ((float)key_of(x[r]) * key_scale + (float)m.mean[c] * step) * m.key[c]);
      store_channel(p.values, place.head * p.value_head + to * p.value_token + c, (float)value_of(x[r]) * value_scale * m.value[c]);
    }
  }
}
#else
__device__ __forceinline__ void Balanced::decode(const PagesParams& p, const Place& place, Memory& m) {
  constexpr int ROUNDS = OWN / AT_ONCE, AHEAD = ROUNDS < 4 ? ROUNDS : 4;
  const int lane = threadIdx.x & 31, slice = lane % LANES, own = (threadIdx.x >> 5) * OWN + lane / LANES;
  const float* consts = (const float*)(place.index + CONSTS);
  const float step = consts[0], key_base = consts[1] * LEVEL_UNIT, value_base = consts[2] * VALUE_UNIT;
  constexpr bool HELD = D < 256;      // where registers suffice
  float factors[HELD ? 16 : 1], shifts[HELD ? 16 : 1];
  const auto factor = [&](int i) { return m.key[channel_of(slice, i)]; };
  const auto shift = [&](int i) { return (float)m.mean[channel_of(slice, i)] * step * factor(i); };
#pragma unroll
  for (int i = 0; i < (HELD ? 16 : 0); i++) { factors[i] = factor(i); shifts[i] = shift(i); }
#pragma unroll 1
  for (int round = 0; round < ROUNDS; round += AHEAD) {
    u32 magnitudes[AHEAD], values[AHEAD], signs[AHEAD], scales[AHEAD];
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {   // all of them on their way before the first is used
      const int token = own + (round + n) * AT_ONCE;
      const u8* codes = place.payload + token * TOKEN;
      magnitudes[n] = read2(codes + 2 * slice);
      values[n] = read2(codes + D / 4 + 2 * slice);
      signs[n] = read1(place.index + token * CODE + slice);
#if VALUE_BITS == 3
      signs[n] |= read1(codes + D / 2 + slice) << 16;
#endif
      scales[n] = __ldg(place.index + KEY_SCALES + token) | (u32)__ldg(place.payload + VALUE_SCALES + token) << 8;
    }
#pragma unroll
    for (int n = 0; n < AHEAD; n++) {
      const int token = own + (round + n) * AT_ONCE;
      u32 key_at[2], value_at[2];
      places(key_at, magnitudes[n], signs[n], false);
#if VALUE_BITS == 3
      places(value_at, values[n], signs[n], true);
#else
      value_at[0] = values[n] & 0x33333333;
      value_at[1] = values[n] >> 2 & 0x33333333;
#endif
      int x[16];
#pragma unroll
      for (int odd = 0; odd < 2; odd++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const u32 keys = prmt(NEGATIVE, POSITIVE, key_at[odd] >> 16 * half);
          const u32 levels = VALUE_BITS == 3 ? prmt(NEGATIVE, POSITIVE, value_at[odd] >> 16 * half) : prmt(EVEN, 0, value_at[odd] >> 16 * half);
#pragma unroll
          for (int i = 0; i < 4; i++) x[8 * half + 2 * i + odd] = lower(keys, i) + (int)upper(levels, i);
        }
      rotate_back_slices(x, lane);
      if (!fits(p, place, token)) continue;
      const float key_scale = scale_of(scales[n] & 0xff) * key_base, value_scale = scale_of(scales[n] >> 8) * value_base;
      const i64 to = place.first + token, key_to = place.head * p.key_head + to * p.key_token, value_to = place.head * p.value_head + to * p.value_token;
#pragma unroll
      for (int half = 0; half < 2; half++) {
        float key[8], value[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
          const int whole = x[8 * half + i];
          const int c = 8 * half + i;
          key[i] = fmaf((float)key_of(whole) * key_scale, HELD ? factors[c] : factor(c), HELD ? shifts[c] : shift(c));
          value[i] = (float)value_of(whole) * value_scale * m.value[channel_of(slice, 8 * half + i)];
        }
        store_channels(p.keys, key_to + channel_of(slice, 8 * half), key);
        store_channels(p.values, value_to + channel_of(slice, 8 * half), value);
      }
    }
  }
}
#endif

extern "C" __global__ void __launch_bounds__(PAGES_THREADS, 2) restore_pages(const __grid_constant__ PagesParams p) { decode_page<Balanced>(p); }
