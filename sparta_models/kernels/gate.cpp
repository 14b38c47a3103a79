// y = x * sigmoid(g), or with a sharpness the smooth maximum of x and g; g = b_c + K x K depthwise correlation of x with w_c,
// K = 3 or 5, zero padding; channels_last.
//
// One pass over memory each way: the forward reads x and writes y; the backward reads x and dy, computes g again instead of
// storing it, and writes dx. A task is one image and one group of L channels.
//
// Weights come as (K * K, C). Arithmetic is float32 whatever the storage (float32 or bfloat16).

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "planes.h"

namespace {

using Optional = std::optional<at::Tensor>;

int64_t grain(Shape s) { return std::max<int64_t>(1, 16384 / (s.height * s.width * L)); }

template <int K, typename F>
void for_planes(const at::Tensor& x, F work) {
  Shape s{x.size(2), x.size(3), x.size(1)};
  int64_t groups = (s.channels + L - 1) / L;
  at::parallel_for(0, x.size(0) * groups, grain(s), [&](int64_t begin, int64_t end) {
    Scratch<K> scratch(s.width);
    for (int64_t task = begin; task < end; ++task) {
      int64_t c = task % groups * L;
      int n = static_cast<int>(std::min<int64_t>(L, s.channels - c));
      work(task / groups * s.height * s.width * s.channels + c, c, n, s, scratch);
    }
  });
}

// The form for L channels from c on.
template <typename Form>
Form form(const Optional& sharpness, const Optional& b, int64_t c, int n) {
  if constexpr (std::is_same_v<Form, SmoothMax>) {
    return {of_channels(b, c, n), of_channels(sharpness, c, n)};
  } else {
    return {of_channels(b, c, n)};
  }
}

template <typename T, int K, typename Form>
void run_forward(const at::Tensor& x, const at::Tensor& w, const Optional& sharpness, const Optional& b,
                 at::Tensor& y) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const float* weights = w.const_data_ptr<float>();
  for_planes<K>(x, [&](int64_t at, int64_t c, int n, Shape s, Scratch<K>& scratch) {
    forward_plane<T, K>(in + at, out + at, scratch, taps<K>(weights, c, s.channels, n), form<Form>(sharpness, b, c, n),
                        s, n);
  });
}

template <typename T, int K, typename Form>
void run_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const Optional& sharpness,
                  const Optional& b, at::Tensor& dx, float* partial) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const T* gradient = static_cast<const T*>(dy.const_data_ptr());
  T* out = static_cast<T*>(dx.mutable_data_ptr());
  const float* weights = w.const_data_ptr<float>();
  for_planes<K>(x, [&](int64_t at, int64_t c, int n, Shape s, Scratch<K>& scratch) {
    Sums<K> sums;
    auto plane = partial ? backward_plane<T, K, true, Form> : backward_plane<T, K, false, Form>;
    plane(in + at, gradient + at, out + at, scratch, taps<K>(weights, c, s.channels, n),
          form<Form>(sharpness, b, c, n), sums, s, n);
    if (partial) add_sums<K>(partial + at::get_thread_num() * ROWS<K> * s.channels + c, sums, s.channels, n);
  });
}

void check(const at::Tensor& x, const at::Tensor& w, const Optional& sharpness, const Optional& b) {
  int64_t channels = x.size(1);
  TORCH_CHECK((w.size(0) == 9 || w.size(0) == 25) && w.size(1) == channels, "expected weights (9 or 25, ", channels,
              "), got ", w.sizes());
  for (const Optional& p : {sharpness, b}) {
    TORCH_CHECK(!p || p->numel() == channels, "expected a parameter (", channels, "), got ", p ? p->sizes() : w.sizes());
  }
}

// Calls `work` with a T, K and Form for these inputs.
template <typename F>
void dispatch(const at::Tensor& x, const at::Tensor& w, const Optional& sharpness, F work) {
  auto with_form = [&](auto type, auto size) {
    sharpness ? work(type, size, std::type_identity<SmoothMax>{}) : work(type, size, std::type_identity<Gate>{});
  };
  auto with_size = [&](auto type) {
    w.size(0) == 9 ? with_form(type, std::integral_constant<int, 3>{})
                   : with_form(type, std::integral_constant<int, 5>{});
  };
  x.scalar_type() == at::kFloat ? with_size(std::type_identity<float>{}) : with_size(std::type_identity<uint16_t>{});
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& w, const Optional& sharpness, const Optional& b) {
  check(x, w, sharpness, b);
  at::Tensor y = at::empty_like(x);
  dispatch(x, w, sharpness, [&](auto type, auto size, auto kind) {
    run_forward<typename decltype(type)::type, size(), typename decltype(kind)::type>(x, w, sharpness, b, y);
  });
  return y;
}

// Returns dx, and where weights are asked for the sums (threads, K * K + 2, C): taps, bias, sharpness.
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w,
                                            const Optional& sharpness, const Optional& b, bool weights) {
  check(x, w, sharpness, b);
  at::Tensor dx = at::empty_like(x);
  at::Tensor partial = at::zeros({weights ? at::get_num_threads() : 0, w.size(0) + 2, x.size(1)}, w.options());
  float* sums = weights ? partial.mutable_data_ptr<float>() : nullptr;
  dispatch(x, w, sharpness, [&](auto type, auto size, auto kind) {
    run_backward<typename decltype(type)::type, size(), typename decltype(kind)::type>(dy, x, w, sharpness, b, dx,
                                                                                       sums);
  });
  return {dx, partial};
}

}  // namespace

TORCH_LIBRARY(sparta_models, m) {
  m.def("gate_forward(Tensor x, Tensor w, Tensor? sharpness, Tensor? b) -> Tensor", &forward);
  m.def("gate_backward(Tensor dy, Tensor x, Tensor w, Tensor? sharpness, Tensor? b, bool weights) -> (Tensor, Tensor)",
        &backward);
}
