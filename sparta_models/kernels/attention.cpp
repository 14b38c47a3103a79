// y = x * sigmoid(g), g = b_c + w_c * x_c + m, m = v * [mean_c x, max_c x]: the depthwise gate and one map for all channels,
// made of two pooled maps by one 3 x 3 correlation, zero padding; channels_last.
//
// A task is one image, whose maps, gate and gradients are made while it is in the cache; nothing but x is kept from forward to
// backward. With h as in planes.h,
//
//   dm = sum of h over channels;   dv = correlation of dm with the maps
//   dx = that of the depthwise gate + (v_0^T * dm) / C + [x = max] (v_1^T * dm) / (how many maxima)
//
// where equal maxima share the gradient, as those of torch's amax do. w comes as (9, C), v as (2, 9).

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "planes.h"

namespace {

// A map of one image with a border of zeros.
struct Bordered {
  int64_t height, width;
  std::vector<float> data;
  explicit Bordered(Shape s) : height(s.height), width(s.width), data((s.height + 2) * (s.width + 2)) {}
  float* row(int64_t r) { return data.data() + (r + 1) * (width + 2) + 1; }
};

// Adds to `out` (H, W) the correlation of `in` with v (9), or the transposed one.
void add_correlation(Bordered& in, const float* v, bool transposed, float* out) {
  for (int64_t r = 0; r < in.height; ++r) {
    for (int t = 0; t < 9; ++t) {
      const float weight = v[transposed ? 8 - t : t];
      const float* from = in.row(r + t / 3 - 1) + t % 3 - 1;
      float* to = out + r * in.width;
      for (int64_t j = 0; j < in.width; ++j) to[j] += weight * from[j];
    }
  }
}

// Adds to dv (9) the correlation of dm with `map`.
void add_weight_gradient(Bordered& dm, Bordered& map, float* dv) {
  for (int t = 0; t < 9; ++t) {
    float sum = 0;
    for (int64_t r = 0; r < dm.height; ++r) {
      const float *a = dm.row(r), *b = map.row(r + t / 3 - 1) + t % 3 - 1;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < dm.width; ++j) sum += a[j] * b[j];
    }
    dv[t] += sum;
  }
}

// What a thread needs for an image.
struct Maps {
  Bordered mean, max, dm;
  std::vector<float> maxima, map, dmean, dmax;  // (H, W)
  std::vector<vf> sums;                         // (H, W)
  Scratch<3> planes;
  explicit Maps(Shape s)
      : mean(s), max(s), dm(s), maxima(s.height * s.width), map(maxima), dmean(maxima), dmax(maxima),
        sums(s.height * s.width), planes(s.width) {}
};

// Mean, maximum, and how many channels have it, at a position with these channels.
template <typename T>
void pool(const T* x, int64_t channels, float& mean, float& max, float& maxima) {
  vf sum = {}, top = splat(-std::numeric_limits<float>::infinity()), count = {};
  int64_t c = 0;
  for (; c + L <= channels; c += L) {
    vf v = load<T, true>(x + c, L);
    sum += v;
    count = v > top ? splat(1.0f) : (v == top ? count + 1.0f : count);
    top = v > top ? v : top;
  }
  float total = 0, highest = -std::numeric_limits<float>::infinity(), number = 0;
  auto take = [&](float value, float times) {
    number = value > highest ? times : (value == highest ? number + times : number);
    highest = value > highest ? value : highest;
  };
  for (int l = 0; l < L; ++l) {
    total += sum[l];
    take(top[l], count[l]);
  }
  for (; c < channels; ++c) {
    float value = load<T, false>(x + c, 1)[0];
    total += value;
    take(value, 1);
  }
  mean = total / static_cast<float>(channels);
  max = highest;
  maxima = number;
}

template <typename T>
void make_map(const T* x, const float* v, Shape s, Maps& maps) {
  for (int64_t r = 0; r < s.height; ++r) {
    for (int64_t j = 0; j < s.width; ++j) {
      int64_t at = r * s.width + j;
      pool(x + at * s.channels, s.channels, maps.mean.row(r)[j], maps.max.row(r)[j], maps.maxima[at]);
    }
  }
  std::fill(maps.map.begin(), maps.map.end(), 0.0f);
  add_correlation(maps.mean, v, false, maps.map.data());
  add_correlation(maps.max, v + 9, false, maps.map.data());
}

// dm from the sums over channel groups; then its way back through the maps.
void through_map(const float* v, Shape s, Maps& maps, float* dv) {
  for (int64_t r = 0; r < s.height; ++r) {
    for (int64_t j = 0; j < s.width; ++j) {
      float sum = 0;
      for (int l = 0; l < L; ++l) sum += maps.sums[r * s.width + j][l];
      maps.dm.row(r)[j] = sum;
    }
  }
  std::fill(maps.dmean.begin(), maps.dmean.end(), 0.0f);
  std::fill(maps.dmax.begin(), maps.dmax.end(), 0.0f);
  add_correlation(maps.dm, v, true, maps.dmean.data());
  add_correlation(maps.dm, v + 9, true, maps.dmax.data());
  if (!dv) return;
  add_weight_gradient(maps.dm, maps.mean, dv);
  add_weight_gradient(maps.dm, maps.max, dv + 9);
}

template <typename T, bool Full>
inline void add_pooled(const T* x, T* dx, vf top, vf mean_share, vf max_share, int n) {
  vf v = load<T, Full>(x, n);
  store<T, Full>(dx, load<T, Full>(dx, n) + mean_share + (v == top ? max_share : vf{}), n);
}

template <typename T>
void add_pooled_gradients(const T* x, T* dx, Shape s, Maps& maps) {
  for (int64_t at = 0; at < s.height * s.width; ++at, x += s.channels, dx += s.channels) {
    vf top = splat(maps.max.row(at / s.width)[at % s.width]);
    vf mean_share = splat(maps.dmean[at] / static_cast<float>(s.channels));
    vf max_share = splat(maps.dmax[at] / maps.maxima[at]);
    int64_t c = 0;
    for (; c + L <= s.channels; c += L) add_pooled<T, true>(x + c, dx + c, top, mean_share, max_share, L);
    if (c < s.channels) add_pooled<T, false>(x + c, dx + c, top, mean_share, max_share, s.channels - c);
  }
}

template <typename F>
void for_images(const at::Tensor& x, F work) {
  Shape s{x.size(2), x.size(3), x.size(1)};
  at::parallel_for(0, x.size(0), 1, [&](int64_t begin, int64_t end) {
    Maps maps(s);
    for (int64_t image = begin; image < end; ++image) work(image * s.height * s.width * s.channels, s, maps);
  });
}

template <typename T>
void run_forward(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, const at::Tensor& v,
                 at::Tensor& y) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  T* out = static_cast<T*>(y.mutable_data_ptr());
  const float *weights = w.const_data_ptr<float>(), *pooled = v.const_data_ptr<float>();
  for_images(x, [&](int64_t at, Shape s, Maps& maps) {
    make_map(in + at, pooled, s, maps);
    for (int64_t c = 0; c < s.channels; c += L) {
      int n = static_cast<int>(std::min<int64_t>(L, s.channels - c));
      GateAndMap form{{of_channels(b, c, n)}, maps.map.data(), nullptr};
      forward_plane<T, 3>(in + at + c, out + at + c, maps.planes, taps<3>(weights, c, s.channels, n), form, s, n);
    }
  });
}

template <typename T>
void run_backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b,
                  const at::Tensor& v, at::Tensor& dx, float* partial, float* dv) {
  const T* in = static_cast<const T*>(x.const_data_ptr());
  const T* gradient = static_cast<const T*>(dy.const_data_ptr());
  T* out = static_cast<T*>(dx.mutable_data_ptr());
  const float *weights = w.const_data_ptr<float>(), *pooled = v.const_data_ptr<float>();
  for_images(x, [&](int64_t at, Shape s, Maps& maps) {
    make_map(in + at, pooled, s, maps);
    std::fill(maps.sums.begin(), maps.sums.end(), vf{});
    float* own = partial ? partial + at::get_thread_num() * ROWS<3> * s.channels : nullptr;
    for (int64_t c = 0; c < s.channels; c += L) {
      int n = static_cast<int>(std::min<int64_t>(L, s.channels - c));
      auto plane = own ? backward_plane<T, 3, true, GateAndMap> : backward_plane<T, 3, false, GateAndMap>;
      Sums<3> sums;
      GateAndMap form{{of_channels(b, c, n)}, maps.map.data(), maps.sums.data()};
      plane(in + at + c, gradient + at + c, out + at + c, maps.planes, taps<3>(weights, c, s.channels, n), form, sums,
            s, n);
      if (own) add_sums<3>(own + c, sums, s.channels, n);
    }
    through_map(pooled, s, maps, dv ? dv + at::get_thread_num() * 18 : nullptr);
    add_pooled_gradients(in + at, out + at, s, maps);
  });
}

at::Tensor forward(const at::Tensor& x, const at::Tensor& w, const std::optional<at::Tensor>& b, const at::Tensor& v) {
  at::Tensor y = at::empty_like(x);
  if (x.scalar_type() == at::kFloat) {
    run_forward<float>(x, w, b, v, y);
  } else {
    run_forward<uint16_t>(x, w, b, v, y);
  }
  return y;
}

// Returns dx, and where weights are asked for the sums of the threads: (threads, 11, C), nine taps, the bias and an
// empty row, and (threads, 2, 9).
std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w,
                                                        const std::optional<at::Tensor>& b, const at::Tensor& v,
                                                        bool weights) {
  at::Tensor dx = at::empty_like(x);
  int64_t threads = weights ? at::get_num_threads() : 0;
  at::Tensor partial = at::zeros({threads, ROWS<3>, x.size(1)}, w.options()), dv = at::zeros({threads, 2, 9}, w.options());
  float* sums = weights ? partial.mutable_data_ptr<float>() : nullptr;
  float* pooled_sums = weights ? dv.mutable_data_ptr<float>() : nullptr;
  if (x.scalar_type() == at::kFloat) {
    run_backward<float>(dy, x, w, b, v, dx, sums, pooled_sums);
  } else {
    run_backward<uint16_t>(dy, x, w, b, v, dx, sums, pooled_sums);
  }
  return {dx, partial, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(sparta_models, m) {
  m.def("attention_forward(Tensor x, Tensor w, Tensor? b, Tensor v) -> Tensor", &forward);
  m.def("attention_backward(Tensor dy, Tensor x, Tensor w, Tensor? b, Tensor v, bool weights) -> (Tensor, Tensor, Tensor)",
        &backward);
}
