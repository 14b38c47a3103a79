// One image and one group of L channels: y from x and g, forward and backward; g is a K x K correlation of x, plus an offset.
// What y is of x and g, a Form says.
//
// The image passes through rings of K rows of floats with K / 2 zeros at each side, so that the inner loops know neither
// borders nor storage. Storage is channels_last.
//
//   dx = direct + transposed correlation of h with w;   dw = correlation of h with x;   direct = dy dy/dx, h = dy dy/dg

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "vector.h"

namespace {

template <int K>
using Taps = std::array<vf, K * K>;  // [row * K + column]

struct Shape {
  int64_t height, width, channels;
};

// The K latest rows of an image of vectors.
template <int K>
class Rows {
 public:
  explicit Rows(int64_t width) : width(width), data(K * (width + K - 1)) {}
  vf* at(int64_t r) { return data.data() + (r + K) % K * (width + K - 1) + K / 2; }
  void clear(int64_t r) { std::fill(at(r), at(r) + width, vf{}); }
  // Before the first row of an image; the zeros at the sides stay.
  void start() {
    for (int64_t r = -(K / 2); r < 0; ++r) clear(r);
  }
  // Rows r - K / 2 to r + K / 2.
  std::array<const vf*, K> around(int64_t r) {
    std::array<const vf*, K> rows;
    for (int i = 0; i < K; ++i) rows[i] = at(r + i - K / 2);
    return rows;
  }

 private:
  int64_t width;
  std::vector<vf> data;
};

template <typename T>
inline vf load(const T* from, int n) {
  return n == L ? load<T, true>(from, n) : load<T, false>(from, n);
}

template <typename T>
inline void store(T* to, vf v, int n) {
  n == L ? store<T, true>(to, v, n) : store<T, false>(to, v, n);
}

// What a thread needs for one plane.
template <int K>
struct Scratch {
  Rows<K> x, h, direct;
  explicit Scratch(int64_t width) : x(width), h(width), direct(width) {}
};

// The correlations with w, or the transposed ones, at B columns from j on: what neighbours share is loaded once.
template <int K, bool Transposed, int B, typename Use>
inline void columns(const std::array<const vf*, K>& rows, const Taps<K>& w, int64_t j, Use& use) {
  std::array<vf, B> sum = {};
#pragma GCC unroll 5
  for (int i = 0; i < K; ++i) {
#pragma GCC unroll 5
    for (int k = 0; k < K; ++k) {
      const vf weight = w[Transposed ? K * K - 1 - i * K - k : i * K + k];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) sum[b] += rows[i][j + b + k - K / 2] * weight;
    }
  }
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) use(j + b, sum[b]);
}

// Calls use(column, correlation) along a row.
template <int K, bool Transposed = false, typename Use>
inline void correlate(const std::array<const vf*, K>& rows, const Taps<K>& w, int64_t width, Use use) {
  int64_t j = 0;
  for (; j + 4 <= width; j += 4) columns<K, Transposed, 4>(rows, w, j, use);
  for (; j < width; ++j) columns<K, Transposed, 1>(rows, w, j, use);
}

// Gradients of a plane's parameters, summed over its positions.
template <int K>
struct Sums {
  Taps<K> taps = {};
  vf bias = {}, sharpness = {};
};

struct Terms {
  vf direct, h, sharpness;  // the last: dy times y's derivative with respect to the sharpness
};

// y = x sigmoid(g).
struct Gate {
  vf b;
  vf start(int64_t) const { return b; }
  vf value(vf x, vf g) const { return x * sigmoid(g); }
  Terms terms(int64_t, vf x, vf g, vf dy) const {
    vf s = sigmoid(g), through = dy * s;
    return {through, through * x * (1.0f - s), vf{}};
  }
};

// The same; to g is added a map of the image that all channels share, and h is summed over channels, L at a time.
struct GateAndMap : Gate {
  const float* map;
  vf* sums;
  vf start(int64_t position) const { return b + map[position]; }
  Terms terms(int64_t position, vf x, vf g, vf dy) const {
    Terms t = Gate::terms(position, x, g, dy);
    sums[position] += t.h;
    return t;
  }
};

// y = g + d sigmoid(beta d), d = x - g: the smooth maximum of x and g.
struct SmoothMax {
  vf b, beta;
  vf start(int64_t) const { return b; }
  vf value(vf x, vf g) const {
    vf d = x - g;
    return g + d * sigmoid(beta * d);
  }
  Terms terms(int64_t, vf x, vf g, vf dy) const {
    vf d = x - g, s = sigmoid(beta * d), slope = d * s * (1.0f - s), direct = dy * (s + beta * slope);
    return {direct, dy - direct, dy * d * slope};
  }
};

// Row r of the image enters the ring; zeros below the last one.
template <typename T, int K>
void enter(Rows<K>& ring, const T* x, int64_t r, Shape s, int n) {
  if (r >= s.height) return ring.clear(r);
  vf* to = ring.at(r);
  x += r * s.width * s.channels;
  for (int64_t j = 0; j < s.width; ++j) to[j] = load(x + j * s.channels, n);
}

template <typename T, int K, typename Form>
void forward_plane(const T* x, T* y, Scratch<K>& scratch, const Taps<K> w, const Form form, Shape s, int n) {
  const int64_t ahead = (K / 2 + 1) * s.width;
  scratch.x.start();
  for (int64_t at = 0; at < s.height + K / 2; ++at) {
    enter(scratch.x, x, at, s, n);
    const int64_t r = at - K / 2;
    if (r < 0) continue;
    const auto rows = scratch.x.around(r);
    correlate<K>(rows, w, s.width, [&](int64_t j, vf sum) {
      const int64_t position = r * s.width + j;
      __builtin_prefetch(x + (position + ahead) * s.channels);
      store(y + position * s.channels, form.value(rows[K / 2][j], form.start(position) + sum), n);
    });
  }
}

template <typename T, int K, bool Weights, typename Form>
void backward_row(const T* x, const T* dy, Scratch<K>& scratch, const Taps<K>& w, const Form form, Sums<K>& sums,
                  int64_t r, Shape s, int n) {
  const int64_t ahead = (K / 2 + 1) * s.width;
  const auto rows = scratch.x.around(r);
  vf *__restrict h = scratch.h.at(r), *__restrict direct = scratch.direct.at(r);
  vf sharpness = sums.sharpness;
  correlate<K>(rows, w, s.width, [&](int64_t j, vf sum) {
    const int64_t position = r * s.width + j;
    const vf g = form.start(position) + sum;
    __builtin_prefetch(x + (position + ahead) * s.channels);
    const Terms t = form.terms(position, rows[K / 2][j], g, load(dy + position * s.channels, n));
    direct[j] = t.direct;
    h[j] = t.h;
    if constexpr (Weights) sharpness += t.sharpness;
  });
  if constexpr (Weights) {
    // Sums in locals, which no store can alias, stay in registers.
    Taps<K> taps = sums.taps;
    vf bias = sums.bias;
    for (int64_t j = 0; j < s.width; ++j) {
      const vf term = h[j];
      bias += term;
#pragma GCC unroll 5
      for (int i = 0; i < K; ++i) {
#pragma GCC unroll 5
        for (int k = 0; k < K; ++k) taps[i * K + k] += term * rows[i][j + k - K / 2];
      }
    }
    sums = {taps, bias, sharpness};
  }
}

template <typename T, int K, bool Weights, typename Form>
void backward_plane(const T* x, const T* dy, T* dx, Scratch<K>& scratch, const Taps<K> w, const Form form,
                    Sums<K>& sums, Shape s, int n) {
  scratch.x.start();
  scratch.h.start();
  for (int64_t at = 0; at < s.height + K - 1; ++at) {
    enter(scratch.x, x, at, s, n);
    const int64_t r = at - K / 2;
    if (r >= 0 && r < s.height) {
      backward_row<T, K, Weights>(x, dy, scratch, w, form, sums, r, s, n);
    } else if (r >= s.height) {
      scratch.h.clear(r);
    }
    const int64_t out = r - K / 2;
    if (out < 0) continue;
    const auto rows = scratch.h.around(out);
    const vf* direct = scratch.direct.at(out);
    correlate<K, true>(rows, w, s.width, [&](int64_t j, vf sum) {
      store(dx + (out * s.width + j) * s.channels, direct[j] + sum, n);
    });
  }
}

inline vf of_channels(const float* values, int64_t c, int n) { return load<float, false>(values + c, n); }

inline vf of_channels(const std::optional<at::Tensor>& values, int64_t c, int n) {
  return values ? of_channels(values->const_data_ptr<float>(), c, n) : vf{};
}

// Weights (K * K, C) of L channels from c on.
template <int K>
inline Taps<K> taps(const float* w, int64_t c, int64_t channels, int n) {
  Taps<K> out;
  for (int t = 0; t < K * K; ++t) out[t] = of_channels(w + t * channels, c, n);
  return out;
}

// Rows of the sums over positions: the taps, the bias, the sharpness.
template <int K>
constexpr int ROWS = K * K + 2;

// Adds the sums of a channel group to a thread's own (ROWS, C), of which `own` is the group's first column.
template <int K>
inline void add_sums(float* own, const Sums<K>& sums, int64_t channels, int n) {
  for (int t = 0; t < ROWS<K>; ++t, own += channels) {
    vf sum = t < K * K ? sums.taps[t] : (t == K * K ? sums.bias : sums.sharpness);
    store<float, false>(own, load<float, false>(own, n) + sum, n);
  }
}

}  // namespace
