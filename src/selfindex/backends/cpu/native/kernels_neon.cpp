// NEON of 64-bit ARM.
#include <arm_neon.h>

#include "kernels.h"

namespace selfindex {
namespace neon {
namespace {

constexpr int kLanes = 4;
struct Lanes {
  static float32x4_t floats(const int8_t* from) {
    int32_t four;
    __builtin_memcpy(&four, from, 4);
    const int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
  }
  static float32x4_t floats(const int16_t* from) { return vcvtq_f32_s32(vmovl_s16(vld1_s16(from))); }
  static unsigned at_least(const float* from, float threshold) {
    const uint32_t weights[4] = {1, 2, 4, 8};
    return vaddvq_u32(vandq_u32(vcgeq_f32(vld1q_f32(from), vdupq_n_f32(threshold)), vld1q_u32(weights)));
  }
  template <class V>
  static void interleave(V a, V b, V& low, V& high) {
    low = (V)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
    high = (V)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
  }
};
#include "kernels_body.h"
#include "formats_body.h"
#include "encode_body.h"
#include "paper_body.h"
#include "window_body.h"

struct Vec {
  using Reg = uint8x16_t;
  static constexpr int kLanes128 = 1;
  static Reg zero() { return vdupq_n_u8(0); }
  static Reg load(const void* from) { return vld1q_u8((const uint8_t*)from); }
  static void store(void* to, Reg x) { vst1q_u8((uint8_t*)to, x); }
  // 8 bytes of two neighbouring tokens.
  static Reg load_pairs(const uint8_t* from, int64_t token) {
    return vcombine_u8(vld1_u8(from), vld1_u8(from + token));
  }
  static Reg spread128(const void* from) { return load(from); }
  static Reg low_nibbles(Reg x) { return vandq_u8(x, vdupq_n_u8(15)); }
  static Reg high_nibbles(Reg x) { return vshrq_n_u8(x, 4); }
  static Reg shuffle(Reg table, Reg code) { return vqtbl1q_u8(table, code); }
  static uint16x8_t words(Reg x) { return vreinterpretq_u16_u8(x); }
  static Reg bytes(uint16x8_t x) { return vreinterpretq_u8_u16(x); }
  static Reg add8(Reg a, Reg b) { return vaddq_u8(a, b); }
  static Reg add16(Reg a, Reg b) { return bytes(vaddq_u16(words(a), words(b))); }
  static Reg sub16(Reg a, Reg b) { return bytes(vsubq_u16(words(a), words(b))); }
  static Reg shift_right16(Reg x) { return bytes(vshrq_n_u16(words(x), 8)); }
  static Reg shift_left16(Reg x) { return bytes(vshlq_n_u16(words(x), 8)); }
  static Reg unpack_low8(Reg a, Reg b) { return vzip1q_u8(a, b); }
  static Reg unpack_high8(Reg a, Reg b) { return vzip2q_u8(a, b); }
  static Reg unpack_low16(Reg a, Reg b) { return bytes(vzip1q_u16(words(a), words(b))); }
  static Reg unpack_high16(Reg a, Reg b) { return bytes(vzip2q_u16(words(a), words(b))); }
  static void store_lanes(int16_t* to, Reg low, Reg high) {
    store(to, low);
    store(to + 8, high);
  }
};
#include "lookup_shuffle.h"

// Levels from packed codes: 16 channels at a time.
void expand(const uint8_t* const* crumbs, const uint8_t* const* signs, int n, int width,
            const int8_t* magnitudes, int8_t* levels) {
  const uint8x16_t table = vld1q_u8((const uint8_t*)magnitudes);
  const uint8_t four[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8_t eight[16] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const int8_t down[16] = {0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6, 0, -2, -4, -6};
  const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t spread4 = vld1q_u8(four), spread8 = vld1q_u8(eight), bits = vld1q_u8(bit);
  const int8x16_t shift = vld1q_s8(down);
  for (int t = 0; t < n; t++) {
    for (int i = 0; i < width; i += 16) {
      uint32_t packed;
      __builtin_memcpy(&packed, crumbs[t] + i / 4, 4);
      const uint8x16_t every = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(packed)), spread4);
      const uint8x16_t code = vandq_u8(vshlq_u8(every, shift), vdupq_n_u8(3));
      uint8x16_t level = vqtbl1q_u8(table, code);
      if (signs) {
        uint16_t word;
        __builtin_memcpy(&word, signs[t] + i / 8, 2);
        const uint8x16_t sign = vqtbl1q_u8(vreinterpretq_u8_u16(vdupq_n_u16(word)), spread8);
        const uint8x16_t negative = vmvnq_u8(vtstq_u8(sign, bits));
        level = vsubq_u8(veorq_u8(level, negative), negative);
      }
      vst1q_u8((uint8_t*)(levels + t * width + i), level);
    }
  }
}

void level_dots(const int8_t* levels, int n, int width, const int16_t* row, int rows,
                int32_t* dots) {
  for (int r = 0; r < rows; r += 4) {
    const int live = rows - r < 4 ? rows - r : 4;
    // Missing rows repeat the last one.
    const int16_t* at[4];
    for (int k = 0; k < 4; k++) at[k] = row + (int64_t)(r + (k < live ? k : live - 1)) * width;
    for (int t = 0; t < n; t++) {
      int32x4_t sum[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
      for (int i = 0; i < width; i += 16) {
        const int8x16_t level = vld1q_s8(levels + t * width + i);
        const int16x8_t low = vmovl_s8(vget_low_s8(level)), high = vmovl_s8(vget_high_s8(level));
        for (int k = 0; k < 4; k++) {
          const int16x8_t a = vld1q_s16(at[k] + i), b = vld1q_s16(at[k] + i + 8);
          sum[k] = vmlal_s16(sum[k], vget_low_s16(low), vget_low_s16(a));
          sum[k] = vmlal_s16(sum[k], vget_high_s16(low), vget_high_s16(a));
          sum[k] = vmlal_s16(sum[k], vget_low_s16(high), vget_low_s16(b));
          sum[k] = vmlal_s16(sum[k], vget_high_s16(high), vget_high_s16(b));
        }
      }
      for (int k = 0; k < live; k++) dots[(r + k) * kTile + t] = vaddvq_s32(sum[k]);
    }
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {"neon", lookup, to_logits, exponentiate, weigh, maxima, join_sums, reaching,
                         mean_dots, rotate, expand, level_dots, dot_logits, accumulate, widen,
                         grouped_dots, grouped_sums, grouped_widen, encode, encode_paper,
                         channel_sums, code_sums, window, window_merge, to_floats};

}  // namespace neon
}  // namespace selfindex
