// The Python module. Tensors come as addresses, checked by the Python files of selfindex/backends/cpu.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "cache.h"
#include "kernels.h"
#include "operators.h"
#include "rows.h"
#include "select.h"

namespace nb = nanobind;
using namespace selfindex;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

const Kernels& named(const std::string& name) {
  if (const Kernels* found = kernels_named(name.c_str())) return *found;
  throw std::invalid_argument("this processor has no " + name);
}

Layout layout(const std::vector<int64_t>& n) {
  if (n.size() != 20) throw std::invalid_argument("a layout has 20 numbers");
  const auto small = [&](int i) { return static_cast<int>(n[i]); };
  return {small(0), small(1), small(2), small(3), n[4],  n[5],  n[6],  n[7], n[8],
          n[9],     n[10],    n[11],    n[12],    n[13], n[14], n[15], n[16], n[17],
          n[18],    static_cast<Preset>(n[19])};
}

Queries queries(uintptr_t query, int64_t groups, int64_t count, int threads, uintptr_t output,
                uintptr_t lse) {
  return {at<const float>(query), groups, count, threads, at<float>(output), at<float>(lse)};
}

// Takes numbers off a list, in the order of native structures.
class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& n) : n_(n) {}
  void end() const {
    if (next_ != n_.size()) throw std::invalid_argument("too many numbers");
  }
  int64_t take() { return n_.at(next_++); }
  int small() { return static_cast<int>(take()); }
  template <class T>
  T* address() { return at<T>(static_cast<uintptr_t>(take())); }
  Strided strided() {
    const uint8_t* first = address<const uint8_t>();
    const int64_t outer = take(), head = take();
    return {first, outer, head, take()};
  }

 private:
  const std::vector<int64_t>& n_;
  size_t next_ = 0;
};

Cache cache(const Layout& layout, Numbers& n, float scaling) {
  Cache c{};
  c.layout = layout;
  c.index = n.address<const uint8_t>();
  c.index_stride = n.take();
  c.payload = n.address<const uint8_t>();
  c.payload_stride = n.take();
  c.blocks = n.take();
  c.table = n.address<const int32_t>();
  c.counts = n.address<const int32_t>();
  c.batch = n.take();
  c.pages = n.take();
  c.constants = n.address<const float>();
  c.constants_stride = n.take();
  c.key_rotation = n.address<const float>();
  c.value_rotation = n.address<const float>();
  c.scaling = scaling;
  return c;
}

PagedTokens paged_tokens(Numbers& n) {
  PagedTokens t{};
  t.at = n.address<uint8_t>();
  t.blocks = n.take();
  t.block = n.take();
  t.head = n.take();
  t.token = n.take();
  t.size = n.take();
  t.table = n.address<const int32_t>();
  t.columns = n.take();
  return t;
}

Pages pages(const Layout& layout, Numbers& n) {
  Pages p{};
  p.layout = layout;
  p.format = static_cast<Format>(n.take());
  p.count = n.take();
  p.counts = n.address<const int32_t>();
  p.constants = n.address<const float>();
  p.constants_stride = n.take();
  p.value_factor = n.address<const float>();
  p.order = n.small();
  p.block = n.address<const float>();
  p.blocks = n.address<const int32_t>();
  p.room = n.take();
  p.index = n.address<uint8_t>();
  p.payload = n.address<uint8_t>();
  p.index_bytes = n.take();
  p.payload_bytes = n.take();
  p.index_stride = n.take();
  p.payload_stride = n.take();
  p.threads = n.small();
  return p;
}

Step step(Numbers& n, float scaling) {
  Step s{};
  s.format = static_cast<Format>(n.take());
  s.batch = n.take();
  s.heads = n.take();
  s.groups = n.small();
  s.dim = n.small();
  s.query = n.strided();
  s.new_keys = n.strided();
  s.new_values = n.strided();
  s.lengths = n.address<const int32_t>();
  s.part = n.address<const float>();
  s.part_lse = n.address<const float>();
  s.sink = n.address<const float>();
  s.output = n.address<uint8_t>();
  s.threads = n.small();
  s.scaling = scaling;
  return s;
}

}  // namespace

NB_MODULE(_native, m) {
  // Layouts live in a Python cache until the interpreter ends.
  nb::set_leak_warnings(false);
  nb::class_<Layout>(m, "Layout").def("__init__", [](Layout* self, const std::vector<int64_t>& n) {
    new (self) Layout(layout(n));
  });
  nb::class_<Cache>(m, "Cache")
      .def("__init__", [](Cache* self, const Layout& layout, const std::vector<int64_t>& numbers, float scaling) {
        Numbers n(numbers);
        new (self) Cache(cache(layout, n, scaling));
        n.end();
      });
  nb::class_<Queries>(m, "Queries")
      .def("__init__", [](Queries* self, uintptr_t query, int64_t groups, int64_t count,
                          int threads, uintptr_t output, uintptr_t lse) {
        new (self) Queries(queries(query, groups, count, threads, output, lse));
      });

  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const char* name : {"avx512", "avx2", "neon", "generic"})
      if (kernels_named(name)) names.push_back(name);
    return names;
  });
  m.def("kept_bytes", &kept_bytes);
  m.def("sparse_decode", [](const std::string& name, const Cache& cache, const Queries& queries,
                            uintptr_t budgets, int64_t width, uintptr_t chosen) {
    const Kernels& kernels = named(name);
    nb::gil_scoped_release release;
    sparse_decode(kernels, cache, queries, at<const int32_t>(budgets), width, at<int32_t>(chosen));
  });
  m.def("dense_attend",
        [](const std::string& name, const Cache& cache, const Queries& queries) {
          const Kernels& kernels = named(name);
          nb::gil_scoped_release release;
          dense_attend(kernels, cache, queries);
        });
  m.def("read_tokens", [](const std::string& name, const Cache& cache, int64_t row, uintptr_t slots,
                          int64_t n, int threads, uintptr_t keys, uintptr_t values) {
    const Kernels& kernels = named(name);
    cache.check();
    nb::gil_scoped_release release;
    read_tokens(kernels, cache, row, at<const int32_t>(slots), n, threads, at<float>(keys), at<float>(values));
  });
  m.def("encode", [](const std::string& name, const Layout& layout, const std::vector<int64_t>& numbers) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    const Strided keys = n.strided(), values = n.strided();
    const Pages given = pages(layout, n);
    n.end();
    nb::gil_scoped_release release;
    encode(kernels, given, keys, values);
  });
  m.def("encode_paged", [](const std::string& name, const Layout& layout, const std::vector<int64_t>& numbers) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    const PagedTokens tokens = paged_tokens(n);
    const int32_t* first = n.address<const int32_t>();
    const Pages given = pages(layout, n);
    n.end();
    nb::gil_scoped_release release;
    encode_paged(kernels, given, tokens, first);
  });
  m.def("prompt_statistics", [](const std::string& name, const std::vector<int64_t>& numbers) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    const Format format = static_cast<Format>(n.take());
    const Strided keys = n.strided();
    const int64_t heads = n.take(), tokens = n.take();
    const int dim = n.small(), threads = n.small();
    float* constants = n.address<float>();
    n.end();
    nb::gil_scoped_release release;
    prompt_statistics(kernels, format, keys, heads, tokens, dim, threads, constants);
  });
  m.def("window_attend", [](const std::string& name, const std::vector<int64_t>& numbers, float scaling) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    uint8_t* keys = n.address<uint8_t>();
    uint8_t* values = n.address<uint8_t>();
    const int64_t room = n.take();
    const Step given = step(n, scaling);
    n.end();
    nb::gil_scoped_release release;
    window_attend(kernels, given, keys, values, room);
  });
  m.def("step_attend", [](const std::string& name, const Layout& layout, const std::vector<int64_t>& numbers,
                          float scaling) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    uint8_t* keys = n.address<uint8_t>();
    uint8_t* values = n.address<uint8_t>();
    const int64_t room = n.take();
    const int32_t* budgets = n.address<const int32_t>();
    const int64_t width = n.take();
    const Cache pools = cache(layout, n, scaling);
    const Step given = step(n, scaling);
    n.end();
    nb::gil_scoped_release release;
    step_attend(kernels, pools, given, keys, values, room, budgets, width);
  });
  m.def("paged_window_attend", [](const std::string& name, const std::vector<int64_t>& numbers, float scaling) {
    const Kernels& kernels = named(name);
    Numbers n(numbers);
    const PagedTokens tokens = paged_tokens(n);
    const int32_t* starts = n.address<const int32_t>();
    const int64_t sinks = n.take();
    const Step given = step(n, scaling);
    n.end();
    nb::gil_scoped_release release;
    paged_window_attend(kernels, given, tokens, starts, sinks);
  });
  m.def("top_k", [](const std::string& name, uintptr_t scores, int64_t n, int64_t count, uintptr_t chosen) {
    SelectScratch scratch;
    return top_k(named(name), at<const float>(scores), n, count, at<int32_t>(chosen), scratch);
  });
  m.def("make_tables", [](uintptr_t query, int dim, uintptr_t tables) {
    return make_tables(at<const float>(query), dim, at<uint8_t>(tables));
  });
  m.def("make_split_tables", [](uintptr_t query, uintptr_t codebook, int dim, uintptr_t tables) {
    return make_split_tables(at<const float>(query), at<const float>(codebook), dim, at<uint8_t>(tables));
  });
  m.def("lookup", [](const std::string& name, uintptr_t codes, int tokens, int bytes,
                     uintptr_t tables, int rows, uintptr_t sums) {
    named(name).lookup(at<const uint8_t>(codes), tokens, bytes, at<const uint8_t>(tables), rows,
                       at<int16_t>(sums), tokens);
  });
}
