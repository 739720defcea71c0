// AVX-512 F, BW, DQ and VL.
#if !defined(__clang__)
// GCC warns about its own header.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include "kernels.h"

namespace selfindex {
namespace avx512 {
namespace {

constexpr int kLanes = 16;
struct Lanes {
  static __m512 floats(const int8_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)));
  }
  static __m512 floats(const int16_t* from) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)from)));
  }
  static unsigned at_least(const float* from, float threshold) {
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(from), _mm512_set1_ps(threshold), _CMP_GE_OQ);
  }
  static void interleave(__m512 a, __m512 b, __m512& low, __m512& high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low = _mm512_permutex2var_ps(a, first, b);
    high = _mm512_permutex2var_ps(a, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b);
  }
};
#include "kernels_body.h"
#include "formats_body.h"
#include "encode_body.h"
#include "paper_body.h"
#include "window_body.h"
#include "decode_avx2.h"
#include "decode_avx512.h"

struct Vec {
  using Reg = __m512i;
  static constexpr int kLanes128 = 4;
  static Reg zero() { return _mm512_setzero_si512(); }
  static Reg load(const void* from) { return _mm512_load_si512(from); }
  static void store(void* to, Reg x) { _mm512_store_si512(to, x); }
  // 8 bytes of two neighbouring tokens in each lane; lanes are 16 tokens apart.
  static Reg load_pairs(const uint8_t* from, int64_t token) {
    return _mm512_setr_epi64(word(from), word(from + token), word(from + 16 * token),
                             word(from + 17 * token), word(from + 32 * token),
                             word(from + 33 * token), word(from + 48 * token),
                             word(from + 49 * token));
  }
  static long long word(const uint8_t* from) {
    long long x;
    __builtin_memcpy(&x, from, 8);
    return x;
  }
  static Reg spread128(const void* from) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)from));
  }
  static Reg low_nibbles(Reg x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
  static Reg high_nibbles(Reg x) { return low_nibbles(_mm512_srli_epi16(x, 4)); }
  static Reg shuffle(Reg table, Reg code) { return _mm512_shuffle_epi8(table, code); }
  static Reg add8(Reg a, Reg b) { return _mm512_add_epi8(a, b); }
  static Reg add16(Reg a, Reg b) { return _mm512_add_epi16(a, b); }
  static Reg sub16(Reg a, Reg b) { return _mm512_sub_epi16(a, b); }
  static Reg shift_right16(Reg x) { return _mm512_srli_epi16(x, 8); }
  static Reg shift_left16(Reg x) { return _mm512_slli_epi16(x, 8); }
  static Reg unpack_low8(Reg a, Reg b) { return _mm512_unpacklo_epi8(a, b); }
  static Reg unpack_high8(Reg a, Reg b) { return _mm512_unpackhi_epi8(a, b); }
  static Reg unpack_low16(Reg a, Reg b) { return _mm512_unpacklo_epi16(a, b); }
  static Reg unpack_high16(Reg a, Reg b) { return _mm512_unpackhi_epi16(a, b); }
  // Lane i of `low` and of `high` hold tokens 16 i and 16 i + 8 onwards.
  static void store_lanes(int16_t* to, Reg low, Reg high) {
    alignas(64) int16_t halves[2][32];
    _mm512_store_si512(halves[0], low);
    _mm512_store_si512(halves[1], high);
    for (int lane = 0; lane < 4; lane++)
      for (int half = 0; half < 2; half++)
        __builtin_memcpy(to + 16 * lane + 8 * half, halves[half] + 8 * lane, 16);
  }
};
#include "lookup_shuffle.h"

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {"avx512", lookup, to_logits, exponentiate, weigh, maxima, join_sums, reaching,
                         mean_dots, rotate, expand_wide, level_dots, dot_logits, accumulate, widen,
                         grouped_dots, grouped_sums, grouped_widen, encode, encode_paper,
                         channel_sums, code_sums, window, window_merge, to_floats};

}  // namespace avx512
}  // namespace selfindex
