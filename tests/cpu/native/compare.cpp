// Every kernel of an instruction set against the generic one, on random numbers: for processors
// that no machine here has, under an emulator (scripts/cpu_emulate.sh). Prints what differs; exit
// code 1 then.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "rows.h"
using namespace selfindex;
static uint32_t seed = 1;
static uint32_t rnd() {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8;
}
static float gauss() {
  float s = 0;
  for (int i = 0; i < 12; i++)
    s += (rnd() & 0xffff) / 65536.f;
  return s - 6;
}
int bad = 0;
#define CHECK(c, ...)              \
  do {                             \
    if (!(c)) {                    \
      bad++;                       \
      printf("FAIL " __VA_ARGS__); \
      printf("\n");                \
    }                              \
  } while (0)
int main(int, char** arguments) {
  const char* names[2] = {arguments[1], "generic"};
  const Kernels* k[2] = {kernels_named(names[0]), kernels_named(names[1])};
  if (!k[0] || !k[1]) {
    printf("this processor has no %s\n", names[0]);
    return 2;
  }
  for (int dim : {64, 80, 96, 128, 192, 256}) {
    int bytes = dim / 8, width = padded(dim);
    for (int tokens : {1, 8, 16, 33, 100, 128, 512})
      for (int rows : {1, 2, 3, 4}) {
        std::vector<uint8_t> codes(tokens * bytes), tables(rows * bytes * 2 * 16);
        for (auto& c : codes)
          c = rnd();
        for (auto& t : tables)
          t = rnd() % 128;
        std::vector<int16_t> s[2];
        for (int i = 0; i < 2; i++) {
          s[i].assign(rows * tokens, 0);
          k[i]->lookup(codes.data(), tokens, bytes, tables.data(), rows, s[i].data(), tokens);
        }
        CHECK(s[0] == s[1], "lookup %d %d %d", dim, tokens, rows);
      }
    // Levels.
    int8_t eight[16] = {13, 40, 71, 114, 40, 0, 0, 0, 71, 0, 0, 0, 114, 0, 0, 0};
    std::vector<uint8_t> store_(16 * (width / 4 + width / 8) + 64);
    for (auto& c : store_)
      c = rnd();
    const uint8_t *cr[16], *sg[16];
    for (int t = 0; t < 16; t++) {
      cr[t] = store_.data() + t * (width / 4);
      sg[t] = store_.data() + 16 * (width / 4) + t * (width / 8);
    }
    for (int withsign = 0; withsign < 2; withsign++)
      for (int n : {1, 7, 16}) {
        std::vector<int8_t> l[2];
        for (int i = 0; i < 2; i++) {
          l[i].assign(16 * width, 0);
          k[i]->expand(cr, withsign ? sg : nullptr, n, width, eight, l[i].data());
        }
        CHECK(l[0] == l[1], "expand %d", dim);
        for (int rows : {1, 2, 3, 4}) {
          std::vector<int16_t> row(rows * width);
          for (auto& r : row)
            r = (int16_t)(rnd() % 65535 - 32767);
          std::vector<int32_t> d[2];
          for (int i = 0; i < 2; i++) {
            d[i].assign(4 * 16, 0);
            k[i]->level_dots(l[0].data(), n, width, row.data(), rows, d[i].data());
          }
          CHECK(d[0] == d[1], "dots %d", dim);
          std::vector<float> w(rows * 16);
          for (auto& x : w)
            x = gauss();
          std::vector<float> a[2];
          for (int i = 0; i < 2; i++) {
            a[i].assign(rows * width, 0.5f);
            k[i]->accumulate(l[0].data(), n, width, w.data(), 16, rows, a[i].data());
          }
          for (size_t j = 0; j < a[0].size(); j++)
            CHECK(std::fabs(a[0][j] - a[1][j]) <= 1e-3f, "acc %f %f", a[0][j], a[1][j]);
        }
      }
    std::vector<float> x(4 * dim), m(dim * dim), y[2];
    for (auto& v : x)
      v = gauss();
    for (auto& v : m)
      v = gauss();
    for (int i = 0; i < 2; i++) {
      y[i].assign(4 * dim, 0);
      k[i]->rotate(x.data(), m.data(), 4, dim, y[i].data());
    }
    for (int j = 0; j < 4 * dim; j++)
      CHECK(std::fabs(y[0][j] - y[1][j]) < 2e-3f, "rotate %f %f", y[0][j], y[1][j]);
    std::vector<int8_t> mean(dim);
    for (auto& v : mean)
      v = (int8_t)rnd();
    for (int i = 0; i < 2; i++) {
      y[i].assign(4, 0);
      k[i]->mean_dots(mean.data(), x.data(), 4, dim, y[i].data());
    }
    for (int j = 0; j < 4; j++)
      CHECK(std::fabs(y[0][j] - y[1][j]) < 1e-2f, "mean %f %f", y[0][j], y[1][j]);
    // Selection and softmax.
    std::vector<float> sc(777);
    for (auto& v : sc)
      v = gauss();
    sc[5] = -INFINITY;
    std::vector<int32_t> f[2];
    for (int i = 0; i < 2; i++) {
      f[i].assign(777, 0);
      int64_t c = k[i]->reaching(sc.data(), 777, 0.3f, f[i].data());
      f[i].resize(c);
    }
    CHECK(f[0] == f[1], "reaching");
    std::vector<int16_t> halves(2 * 100);
    for (auto& v : halves)
      v = rnd() % 8129;
    std::vector<float> joined[2];
    for (int i = 0; i < 2; i++) {
      joined[i].assign(100, 0);
      k[i]->join_sums(halves.data(), halves.data() + 100, 100, joined[i].data());
    }
    CHECK(joined[0] == joined[1], "join_sums");
    // Tokens of the paper preset.
    int shared = (dim + kPaperGroup - 1) / kPaperGroup;
    std::vector<float> ends(2 * 16 * shared), row(4 * dim);
    for (auto& v : ends)
      v = gauss();
    for (auto& v : row)
      v = gauss();
    for (int n : {1, 7, 16}) {
      GroupedTokens keys{cr, sg, ends.data(), ends.data() + 16 * shared, n, dim}, values = keys;
      values.signs = nullptr;
      for (int rows : {1, 2, 3, 4, 7}) {
        std::vector<float> queries(rows * dim), d[2], s[2];
        for (size_t j = 0; j < queries.size(); j++)
          queries[j] = row[j % row.size()];
        for (int i = 0; i < 2; i++) {
          d[i].assign(rows * kTile, 0);
          k[i]->grouped_dots(keys, queries.data(), rows, d[i].data());
          s[i].assign(rows * width, 0.5f);
          k[i]->grouped_sums(values, row.data(), 16, rows, s[i].data(), width);
        }
        for (int j = 0; j < rows * kTile; j++)
          CHECK(std::fabs(d[0][j] - d[1][j]) <= 1e-3f, "grouped_dots %f %f", d[0][j], d[1][j]);
        for (int j = 0; j < rows * width; j++)
          CHECK(std::fabs(s[0][j] - s[1][j]) <= 1e-4f, "grouped_sums %f %f", s[0][j], s[1][j]);
      }
      std::vector<float> w[2];
      for (int i = 0; i < 2; i++) {
        w[i].assign(2 * n * dim, 0);
        k[i]->grouped_widen(keys, row.data(), row.data() + dim, w[i].data());
        k[i]->grouped_widen(values, nullptr, nullptr, w[i].data() + n * dim);
      }
      for (int j = 0; j < 2 * n * dim; j++)
        CHECK(std::fabs(w[0][j] - w[1][j]) <= 1e-5f, "grouped_widen %f %f", w[0][j], w[1][j]);
    }
    std::vector<float> mx[2];
    for (int i = 0; i < 2; i++) {
      mx[i].assign(97, 0);
      k[i]->maxima(sc.data(), 8, 97, mx[i].data());
    }
    CHECK(mx[0] == mx[1], "maxima");
    std::vector<float> e[2];
    float su[2];
    for (int i = 0; i < 2; i++) {
      e[i] = sc;
      su[i] = k[i]->exponentiate(e[i].data(), 777, 0.5f, 3.f);
    }
    CHECK(std::fabs(su[0] - su[1]) < 1e-4f * su[1], "exp %f %f", su[0], su[1]);
    std::vector<int16_t> sums(100);
    for (auto& v : sums)
      v = rnd() % 4000;
    std::vector<float> gain(100);
    for (auto& v : gain)
      v = std::fabs(gauss());
    std::vector<float> lg[2];
    float tp[2];
    for (int i = 0; i < 2; i++) {
      lg[i].assign(100, 0);
      tp[i] = k[i]->to_logits(sums.data(), gain.data(), 100, 2048, .01f, .5f, lg[i].data());
    }
    CHECK(std::fabs(tp[0] - tp[1]) < 1e-4f, "logits");
    for (int j = 0; j < 100; j++)
      CHECK(std::fabs(lg[0][j] - lg[1][j]) < 1e-4f, "logit");
    std::vector<float> vt[2];
    float wt[3] = {.1f, .2f, .3f};
    for (int i = 0; i < 2; i++) {
      vt[i].assign(250, 0);
      k[i]->weigh(sc.data(), 250, wt, 3, 250, vt[i].data());
      for (auto& v : vt[i])
        if (!std::isfinite(v))
          v = 0;
    }
    for (int j = 0; j < 250; j++)
      CHECK(std::fabs(vt[0][j] - vt[1][j]) < 1e-5f, "weigh");
    // Encoding and window in the three formats.
    for (int fmt = 0; fmt < 3; fmt++)
      for (int bits : {2, 3})
        for (int live : {0, 1, 13, 40}) {
          Layout L{};
          L.heads = 1;
          L.dim = dim;
          L.page = 40;
          L.value_bits = bits;
          L.codes = 0;
          L.key_scale = 40 * dim / 8;
          L.mean = L.key_scale + 40;
          L.mean_step = L.mean + dim;
          L.key_base = L.mean_step + 4;
          L.value_base = L.key_base + 4;
          L.index_record = L.value_base + 64;
          L.magnitudes = 0;
          L.values = dim / 4;
          L.value_signs = dim / 2;
          L.token = dim / 2 + (bits == 3 ? dim / 8 : 0);
          L.value_scale = L.token * 40;
          L.payload_record = L.value_scale + 64;
          int sz = fmt == 0 ? 4 : 2;
          std::vector<uint8_t> raw(2 * 40 * dim * sz);
          for (int j = 0; j < 2 * 40 * dim; j++) {
            float g = gauss();
            if (fmt == 0)
              memcpy(&raw[4 * j], &g, 4);
            else {
              uint32_t b;
              memcpy(&b, &g, 4);
              uint16_t h;
              if (fmt == 1)
                h = b >> 16;
              else {
                h = (uint16_t)((b >> 16 & 0x8000) | (((b & 0x7fffffff) >> 13) - (112 << 10)));
                if (std::fabs(g) < 1e-4f)
                  h = 0;
              }
              memcpy(&raw[2 * j], &h, 2);
            }
          }
          int order = dim == 80 ? 20 : dim % 12 == 0 ? 12 : 1;
          std::vector<float> block(order * order);
          for (auto& v : block)
            v = rnd() & 1 ? 1.f : -1.f;
          std::vector<float> fac(dim);
          for (auto& v : fac)
            v = (rnd() & 1 ? 1.f : -1.f) / std::sqrt((float)dim);
          std::vector<uint8_t> I[2], P[2];
          std::vector<float> scratch(48 * dim + 64), scales(48 + 16);
          for (int i = 0; i < 2; i++) {
            I[i].assign(L.index_record, 0);
            P[i].assign(L.payload_record, 0);
            float* sp = (float*)(((uintptr_t)scratch.data() + 63) / 64 * 64);
            k[i]->encode({&L, (Format)fmt, raw.data(), raw.data() + 40 * dim * sz,
                          (int64_t)dim * sz, (int64_t)dim * sz, live, fac.data(), fac.data(), order,
                          block.data(), I[i].data(), P[i].data(), sp, scales.data()});
          }
          int diff = 0;
          for (size_t j = 0; j < P[0].size(); j++)
            diff += P[0][j] != P[1][j];
          int di = 0;
          for (size_t j = 0; j < (size_t)L.mean_step; j++)
            di += I[0][j] != I[1][j];
          CHECK(diff <= 2 && di <= 2, "encode dim %d fmt %d bits %d live %d: %d %d bytes of %zu",
                dim, fmt, bits, live, diff, di, P[0].size());
          Layout paper = L;
          paper.preset = kPaper;
          paper.token = dim / 2;
          paper.key_scale = paper.token * 40;
          paper.key_zero = paper.key_scale + 40 * 2 * shared;
          paper.value_scale = paper.key_zero + 40 * 2 * shared;
          paper.value_zero = paper.value_scale + 40 * 2 * shared;
          paper.payload_record = paper.value_zero + 40 * 2 * shared;
          std::vector<float> statistics(2 * dim);  // mean and alpha, one of them 0
          for (auto& v : statistics)
            v = std::fabs(gauss());
          statistics[dim + 3] = 0;
          for (int i = 0; i < 2; i++) {
            I[i].assign(L.index_record, 0);
            P[i].assign(paper.payload_record, 0);
            k[i]->encode_paper({&paper, (Format)fmt, raw.data(), raw.data() + 40 * dim * sz,
                                (int64_t)dim * sz, (int64_t)dim * sz, live, statistics.data(), nullptr, 1,
                                nullptr, I[i].data(), P[i].data(), nullptr, nullptr});
          }
          std::vector<float> channels[2], largest[2], codes[2];
          std::vector<int32_t> members[2];
          for (int i = 0; i < 2; i++) {
            channels[i].assign(dim, 0);
            largest[i].assign(dim, 0);
            codes[i].assign(16 * dim, 0);
            members[i].assign(4 * dim, 0);
            k[i]->channel_sums(raw.data(), (Format)fmt, (int64_t)dim * sz, live, dim, channels[i].data());
            k[i]->code_sums(raw.data(), (Format)fmt, (int64_t)dim * sz, live, dim, statistics.data(),
                            largest[i].data(), codes[i].data(), members[i].data());
          }
          CHECK(channels[0] == channels[1], "channel_sums dim %d fmt %d live %d", dim, fmt, live);
          CHECK(largest[0] == largest[1] && codes[0] == codes[1] && members[0] == members[1],
                "code_sums dim %d fmt %d live %d", dim, fmt, live);
          CHECK(I[0] == I[1] && P[0] == P[1], "encode_paper dim %d fmt %d live %d", dim, fmt, live);
          // The window, over the same numbers.
          int groups = 3;
          std::vector<float> part(groups * dim), lse(groups), sink(groups), lg2(4 * 40);
          for (auto& v : part)
            v = gauss();
          for (auto& v : lse)
            v = gauss();
          for (auto& v : sink)
            v = gauss();
          std::vector<int64_t> places;  // backwards
          for (int t = live; t-- > 0;)
            places.push_back((int64_t)t * dim * sz);
          std::vector<uint8_t> o[2];
          std::vector<float> wide[2];
          for (int i = 0; i < 2; i++) {
            std::vector<float> ws(groups * dim), top(groups), mass(groups);
            o[i].assign(groups * dim * sz, 0);
            k[i]->window({(Format)fmt, dim, groups, raw.data(), (int64_t)dim * sz, raw.data(),
                          raw.data() + 40 * dim * sz, places.data(), live, 0.125f, lg2.data(), ws.data(),
                          top.data(), mass.data()});
            k[i]->window_merge({(Format)fmt, dim, groups, ws.data(), top.data(), mass.data(), part.data(),
                                lse.data(), sink.data(), o[i].data()});
            wide[i].assign(dim, 0);
            k[i]->to_floats(raw.data(), (Format)fmt, dim, wide[i].data());
          }
          CHECK(wide[0] == wide[1], "to_floats");
          int od = 0;
          double worst = 0;
          for (int j = 0; j < groups * dim; j++) {
            if (fmt == 0) {
              float a, b;
              memcpy(&a, &o[0][4 * j], 4);
              memcpy(&b, &o[1][4 * j], 4);
              worst = std::fmax(worst, std::fabs(a - b));
            } else {
              uint16_t a, b;
              memcpy(&a, &o[0][2 * j], 2);
              memcpy(&b, &o[1][2 * j], 2);
              od += std::abs((int)a - (int)b) > 1;
            }
          }
          CHECK(worst < 1e-5 && od == 0, "window %d fmt %d live %d: %g %d", dim, fmt, live, worst,
                od);
        }
  }
  printf(bad ? "%d failures\n" : "all equal\n", bad);
  return bad != 0;
}
