// y = x * sigmoid(g), g = b_c + 3 x 3 depthwise correlation of x with w_c, zero padding; channels_last.
//
// One pass over memory each way: the forward reads x and writes y; the backward reads x and dy, computes g again instead of
// storing it, and writes dx. A task is one image and one group of L channels.
//
// Weights come as (9, C). Arithmetic is float32 whatever the storage (float32 or bfloat16).

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "planes.h"

namespace {

int64_t grain(Shape s) { return std::max<int64_t>(1, 16384 / (s.height * s.width * L)); }

template <typename T, typename F>
void for_planes(const at::Tensor& x, F work) {
  Shape s{x.size(2), x.size(3), x.size(1)};
  int64_t groups = (s.channels + L - 1) / L;
  at::parallel_for(0, x.size(0) * groups, grain(s), [&](int64_t begin, int64_t end) {
    Ring ring(s.width);
    for (int64_t task = begin; task < end; ++task) {
      int64_t c = task % groups * L;
      int n = static_cast<int>(std::min<int64_t>(L, s.channels - c));
      work(task / groups * s.height * s.width * s.channels + c, c, n, s, ring);
    }
  });
}

template <typename T>
void run_forward(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, at::Tensor& y) {
  const T zero[L] = {};
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const float* weights = w.const_data_ptr<float>();
  for_planes<T>(x, [&](int64_t at, int64_t c, int n, Shape s, Ring&) {
    auto plane = n == L ? forward_plane<T, true, Bias> : forward_plane<T, false, Bias>;
    plane(in + at, out + at, zero, taps(weights, c, s.channels, n), Bias{bias(b, c, n)}, s, n);
  });
}

template <typename T>
void run_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                  at::Tensor& dx, float* partial) {
  const T zero[L] = {};
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const T* gradient = static_cast<const T*>(dy.const_data_ptr());
  T* out = static_cast<T*>(dx.mutable_data_ptr());
  const float* weights = w.const_data_ptr<float>();
  for_planes<T>(x, [&](int64_t at, int64_t c, int n, Shape s, Ring& ring) {
    Window dw = {};
    vf db = {};
    auto plane = partial ? (n == L ? backward_plane<T, true, true, Bias> : backward_plane<T, false, true, Bias>)
                         : (n == L ? backward_plane<T, true, false, Bias> : backward_plane<T, false, false, Bias>);
    Window w = taps(weights, c, s.channels, n);
    plane(in + at, gradient + at, out + at, zero, ring, w, Bias{bias(b, c, n)}, dw, db, s, n);
    if (partial) add_sums(partial + at::get_thread_num() * 10 * s.channels + c, dw, db, s.channels, n);
  });
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b) {
  at::Tensor y = at::empty_like(x);
  if (x.scalar_type() == at::kFloat) {
    run_forward<float>(x, w, b, y);
  } else {
    run_forward<uint16_t>(x, w, b, y);
  }
  return y;
}

// Returns dx, and where weights are asked for the sums (threads, 10, C): nine taps and the bias.
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w,
                                            const std::optional<at::Tensor>& b, bool weights) {
  at::Tensor dx = at::empty_like(x);
  at::Tensor partial = at::zeros({weights ? at::get_num_threads() : 0, 10, x.size(1)}, w.options());
  float* sums = weights ? partial.mutable_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    run_backward<float>(dy, x, w, b, dx, sums);
  } else {
    run_backward<uint16_t>(dy, x, w, b, dx, sums);
  }
  return {dx, partial};
}

}  // namespace

TORCH_LIBRARY(sparta_models, m) {
  m.def("gate_forward(Tensor x, Tensor w, Tensor? b) -> Tensor", &forward);
  m.def("gate_backward(Tensor dy, Tensor x, Tensor w, Tensor? b, bool weights) -> (Tensor, Tensor)", &backward);
}
