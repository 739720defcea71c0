// The Python module. Tensors come as addresses, checked by selfindex/backends/cpu/native.py.
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
  if (n.size() != 17) throw std::invalid_argument("a layout has 17 numbers");
  const auto small = [&](int i) { return static_cast<int>(n[i]); };
  return {small(0), small(1), small(2), small(3), n[4],  n[5],  n[6],  n[7], n[8],
          n[9],     n[10],    n[11],    n[12],    n[13], n[14], n[15], n[16]};
}

Cache cache(const Layout& layout, uintptr_t index, int64_t index_stride, uintptr_t payload,
            int64_t payload_stride, int64_t blocks, uintptr_t table, uintptr_t counts,
            int64_t batch, int64_t pages, uintptr_t balance, int64_t balance_stride,
            uintptr_t key_rotation, uintptr_t value_rotation, float scaling) {
  return {layout,
          at<const uint8_t>(index),
          at<const uint8_t>(payload),
          index_stride,
          payload_stride,
          blocks,
          at<const int32_t>(table),
          at<const int32_t>(counts),
          batch,
          pages,
          at<const float>(balance),
          balance_stride,
          at<const float>(key_rotation),
          at<const float>(value_rotation),
          scaling};
}

Queries queries(uintptr_t query, int64_t groups, int64_t count, int threads, uintptr_t output,
                uintptr_t lse) {
  return {at<const float>(query), groups, count, threads, at<float>(output), at<float>(lse)};
}

// Takes numbers off a list, in the order of native structures.
class Numbers {
 public:
  explicit Numbers(const std::vector<int64_t>& n) : n_(n) {}
  ~Numbers() noexcept(false) {
    if (next_ != n_.size() && !std::uncaught_exceptions()) throw std::invalid_argument("too many numbers");
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

Pages pages(const Layout& layout, const std::vector<int64_t>& numbers) {
  Numbers n(numbers);
  Pages p{};
  p.layout = layout;
  p.format = static_cast<Format>(n.take());
  p.count = n.take();
  p.keys = n.strided();
  p.values = n.strided();
  p.counts = n.address<const int32_t>();
  p.key_factor = n.address<const float>();
  p.factor_stride = n.take();
  p.value_factor = n.address<const float>();
  p.order = n.small();
  p.block = n.address<const float>();
  p.index = n.address<uint8_t>();
  p.payload = n.address<uint8_t>();
  p.index_stride = n.take();
  p.payload_stride = n.take();
  p.threads = n.small();
  return p;
}

Window window(const std::vector<int64_t>& numbers, float scaling) {
  Numbers n(numbers);
  Window w{};
  w.format = static_cast<Format>(n.take());
  w.batch = n.take();
  w.heads = n.take();
  w.room = n.take();
  w.groups = n.small();
  w.dim = n.small();
  w.query = n.strided();
  w.new_keys = n.strided();
  w.new_values = n.strided();
  w.keys = n.address<uint8_t>();
  w.values = n.address<uint8_t>();
  w.lengths = n.address<const int32_t>();
  w.part = n.address<const float>();
  w.part_lse = n.address<const float>();
  w.sink = n.address<const float>();
  w.output = n.address<uint8_t>();
  w.threads = n.small();
  w.scaling = scaling;
  return w;
}

}  // namespace

NB_MODULE(_native, m) {
  // Layouts live in a Python cache until the interpreter ends.
  nb::set_leak_warnings(false);
  nb::class_<Layout>(m, "Layout").def("__init__", [](Layout* self, const std::vector<int64_t>& n) {
    new (self) Layout(layout(n));
  });
  nb::class_<Cache>(m, "Cache").def(
      "__init__", [](Cache* self, const Layout& layout, uintptr_t index, int64_t index_stride,
                     uintptr_t payload, int64_t payload_stride, int64_t blocks, uintptr_t table,
                     uintptr_t counts, int64_t batch, int64_t pages, uintptr_t balance,
                     int64_t balance_stride, uintptr_t key_rotation, uintptr_t value_rotation,
                     float scaling) {
        new (self) Cache(cache(layout, index, index_stride, payload, payload_stride, blocks, table,
                               counts, batch, pages, balance, balance_stride, key_rotation,
                               value_rotation, scaling));
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
    const Pages given = pages(layout, numbers);
    nb::gil_scoped_release release;
    encode(kernels, given);
  });
  m.def("window_attend", [](const std::string& name, const std::vector<int64_t>& numbers, float scaling) {
    const Kernels& kernels = named(name);
    const Window given = window(numbers, scaling);
    nb::gil_scoped_release release;
    window_attend(kernels, given);
  });
  m.def("top_k", [](const std::string& name, uintptr_t scores, int64_t n, int64_t count, uintptr_t chosen) {
    SelectScratch scratch;
    return top_k(named(name), at<const float>(scores), n, count, at<int32_t>(chosen), scratch);
  });
  m.def("make_tables", [](uintptr_t query, int dim, uintptr_t tables) {
    return make_tables(at<const float>(query), dim, at<uint8_t>(tables));
  });
  m.def("lookup", [](const std::string& name, uintptr_t codes, int tokens, int bytes,
                     uintptr_t tables, int rows, uintptr_t sums) {
    named(name).lookup(at<const uint8_t>(codes), tokens, bytes, at<const uint8_t>(tables), rows,
                       at<int16_t>(sums), tokens);
  });
}
