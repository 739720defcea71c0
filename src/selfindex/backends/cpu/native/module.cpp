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
    for (const char* name : {"avx512", "avx2", "generic"})
      if (kernels_named(name)) names.push_back(name);
    return names;
  });
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
