// Every family of products has its own file, and tells Python of it in a function of its own.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include "product.h"

namespace tersor {

namespace nb = nanobind;

template <typename T, size_t Dimensions>
using In = nb::ndarray<const T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;
template <typename T, size_t Dimensions>
using Out = nb::ndarray<T, nb::ndim<Dimensions>, nb::c_contig, nb::device::cpu>;

void bind_row_codes(nb::module_& module);
void bind_step(nb::module_& module);
void bind_dense(nb::module_& module);
void bind_compose(nb::module_& module);
void bind_trellis(nb::module_& module);
void bind_codebook(nb::module_& module);
void bind_gguf(nb::module_& module);
void bind_gguf_grids(nb::module_& module);
void bind_other_rows(nb::module_& module);

}  // namespace tersor
