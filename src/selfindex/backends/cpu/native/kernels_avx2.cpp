// AVX2, FMA.
#include <immintrin.h>

#include "kernels.h"

namespace selfindex {
namespace avx2 {
namespace {

constexpr int kLanes = 8;
struct Lanes {
  static __m256 floats(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
  }
  static __m256 floats(const int16_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)from)));
  }
  static unsigned at_least(const float* from, float threshold) {
    return (unsigned)_mm256_movemask_ps(
        _mm256_cmp_ps(_mm256_loadu_ps(from), _mm256_set1_ps(threshold), _CMP_GE_OQ));
  }
  static void interleave(__m256 a, __m256 b, __m256& low, __m256& high) {
    const __m256 x = _mm256_unpacklo_ps(a, b), y = _mm256_unpackhi_ps(a, b);
    low = _mm256_permute2f128_ps(x, y, 0x20);
    high = _mm256_permute2f128_ps(x, y, 0x31);
  }
};
#include "kernels_body.h"
#include "formats_body.h"
#include "encode_body.h"
#include "paper_body.h"
#include "window_body.h"
#include "decode_avx2.h"

inline __m256i dot_step(__m256i sum, __m256i level, const int16_t* row) {
  return _mm256_add_epi32(sum,
                          _mm256_madd_epi16(level, _mm256_loadu_si256((const __m256i*)row)));
}

void level_dots(const int8_t* levels, int n, int width, const int16_t* row, int rows,
                int32_t* dots) {
  for (int r = 0; r < rows; r += 4) {
    const int live = rows - r < 4 ? rows - r : 4;
    // Missing rows repeat the last one.
    const int16_t* at[4];
    for (int i = 0; i < 4; i++) at[i] = row + (int64_t)(r + (i < live ? i : live - 1)) * width;
    for (int t = 0; t < n; t++) {
      const int8_t* level = levels + t * width;
      __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                        _mm256_setzero_si256()};
      for (int i = 0; i < width; i += 16) {
        const __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(level + i)));
        for (int k = 0; k < 4; k++) sum[k] = dot_step(sum[k], x, at[k] + i);
      }
      alignas(16) int32_t four[4];
      _mm_store_si128((__m128i*)four, lane_sums(sum[0], sum[1], sum[2], sum[3]));
      for (int k = 0; k < live; k++) dots[(r + k) * kTile + t] = four[k];
    }
  }
}

struct Vec {
  using Reg = __m256i;
  static constexpr int kLanes128 = 2;
  static Reg zero() { return _mm256_setzero_si256(); }
  static Reg load(const void* from) { return _mm256_load_si256((const Reg*)from); }
  static void store(void* to, Reg x) { _mm256_store_si256((Reg*)to, x); }
  // 8 bytes of two neighbouring tokens in each lane; lanes are 16 tokens apart.
  static Reg load_pairs(const uint8_t* from, int64_t token) {
    return _mm256_setr_epi64x(word(from), word(from + token), word(from + 16 * token),
                              word(from + 17 * token));
  }
  static long long word(const uint8_t* from) {
    long long x;
    __builtin_memcpy(&x, from, 8);
    return x;
  }
  static Reg spread128(const void* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
  }
  static Reg low_nibbles(Reg x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Reg high_nibbles(Reg x) { return low_nibbles(_mm256_srli_epi16(x, 4)); }
  static Reg shuffle(Reg table, Reg code) { return _mm256_shuffle_epi8(table, code); }
  static Reg add8(Reg a, Reg b) { return _mm256_add_epi8(a, b); }
  static Reg add16(Reg a, Reg b) { return _mm256_add_epi16(a, b); }
  static Reg sub16(Reg a, Reg b) { return _mm256_sub_epi16(a, b); }
  static Reg shift_right16(Reg x) { return _mm256_srli_epi16(x, 8); }
  static Reg shift_left16(Reg x) { return _mm256_slli_epi16(x, 8); }
  static Reg unpack_low8(Reg a, Reg b) { return _mm256_unpacklo_epi8(a, b); }
  static Reg unpack_high8(Reg a, Reg b) { return _mm256_unpackhi_epi8(a, b); }
  static Reg unpack_low16(Reg a, Reg b) { return _mm256_unpacklo_epi16(a, b); }
  static Reg unpack_high16(Reg a, Reg b) { return _mm256_unpackhi_epi16(a, b); }
  // Lane i of `low` and of `high` hold tokens 16 i and 16 i + 8 onwards.
  static void store_lanes(int16_t* to, Reg low, Reg high) {
    _mm256_storeu_si256((Reg*)to, _mm256_permute2x128_si256(low, high, 0x20));
    _mm256_storeu_si256((Reg*)(to + 16), _mm256_permute2x128_si256(low, high, 0x31));
  }
};
#include "lookup_shuffle.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {"avx2", lookup, to_logits, exponentiate, weigh, maxima, join_sums, reaching,
                         mean_dots, rotate, expand, level_dots, dot_logits, accumulate, widen,
                         grouped_dots, grouped_sums, grouped_widen, encode, encode_paper,
                         channel_sums, code_sums, window, window_merge, to_floats};

}  // namespace avx2
}  // namespace selfindex
