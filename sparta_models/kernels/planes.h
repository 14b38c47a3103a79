// One image and one group of L channels: y = x * sigmoid(g), g = 3 x 3 correlation of x + offset, forward and backward.
//
// Rows stream through registers: the window of 3 x 3 positions slides along a row, and three rows of the backward's terms
// stay in a ring. Storage is channels_last.
//
//   h = dy * x * s (1 - s), s = sigmoid(g);   dx = dy * s + transposed correlation of h with w;   dw = correlation of h with x

#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "vector.h"

namespace {

using Window = std::array<vf, 9>;  // [row * 3 + column]

// Three neighbouring rows; one outside the image is a zero that isn't moved along.
template <typename T>
struct Rows {
  std::array<const T*, 3> row;
  std::array<int64_t, 3> stride;

  Rows(const T* plane, const T* zero, int64_t r, int64_t height, int64_t width, int64_t channels) {
    for (int i = 0; i < 3; ++i) {
      int64_t at = r + i - 1;
      bool inside = at >= 0 && at < height;
      row[i] = inside ? plane + at * width * channels : zero;
      stride[i] = inside ? channels : 0;
    }
  }

  template <bool Full>
  inline void enter(Window& window, int64_t column, int64_t width, int n) const {
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      window[3 * i] = window[3 * i + 1];
      window[3 * i + 1] = window[3 * i + 2];
      window[3 * i + 2] = column < width ? load<T, Full>(row[i] + column * stride[i], n) : vf{};
    }
  }
};

inline vf dot(const Window& a, const Window& b, vf start) {
#pragma GCC unroll 9
  for (int t = 0; t < 9; ++t) start += a[t] * b[t];
  return start;
}

struct Shape {
  int64_t height, width, channels;
};

// What is added to the correlation at a position, and where the backward's h goes besides: nothing but the bias, ...
struct Bias {
  vf b;
  vf at(int64_t) const { return b; }
  void take(int64_t, vf) const {}
};

// ... or a map of the image that all channels share, and the sum of h over channels, L at a time.
struct BiasAndMap {
  vf b;
  const float* map;
  vf* sums;
  vf at(int64_t position) const { return b + map[position]; }
  void take(int64_t position, vf h) const { sums[position] += h; }
};

template <typename T, bool Full, typename Offset>
void forward_plane(const T* x, T* y, const T* zero, Window w, Offset b, Shape s, int n) {
  for (int64_t r = 0; r < s.height; ++r) {
    Rows<T> rows(x, zero, r, s.height, s.width, s.channels);
    Window window = {};
    rows.template enter<Full>(window, 0, s.width, n);
    for (int64_t j = 0; j < s.width; ++j) {
      rows.template enter<Full>(window, j + 1, s.width, n);
      store<T, Full>(y + (r * s.width + j) * s.channels, window[4] * sigmoid(dot(w, window, b.at(r * s.width + j))), n);
    }
  }
}

// Terms of the backward for three rows: h with a zero column at each side, and dy * s.
struct Ring {
  std::vector<vf> h, direct;
  int64_t width;
  explicit Ring(int64_t width) : h(3 * (width + 2)), direct(3 * width), width(width) {}
  vf* h_row(int64_t r) { return h.data() + (r + 3) % 3 * (width + 2); }
  vf* direct_row(int64_t r) { return direct.data() + (r + 3) % 3 * width; }
};

template <typename T, bool Full, bool Weights, typename Offset>
void backward_row(const T* x, const T* dy, const T* zero, Ring& ring, Window w, Offset b, Window& dw_sum, vf& db_sum,
                  int64_t r, Shape s, int n) {
  Rows<T> rows(x, zero, r, s.height, s.width, s.channels);
  vf *__restrict h = ring.h_row(r), *__restrict direct = ring.direct_row(r);
  Window window = {};
  // Sums in locals, which no store can alias, stay in registers.
  Window dw = dw_sum;
  vf db = db_sum;
  rows.template enter<Full>(window, 0, s.width, n);
  for (int64_t j = 0; j < s.width; ++j) {
    rows.template enter<Full>(window, j + 1, s.width, n);
    vf gate = sigmoid(dot(w, window, b.at(r * s.width + j)));
    vf through = load<T, Full>(dy + (r * s.width + j) * s.channels, n) * gate;
    vf term = through * window[4] * (1.0f - gate);
    direct[j] = through;
    h[j + 1] = term;
    b.take(r * s.width + j, term);
    if constexpr (Weights) {
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) dw[t] += term * window[t];
      db += term;
    }
  }
  if constexpr (Weights) {
    dw_sum = dw;
    db_sum = db;
  }
}

template <typename T, bool Full>
void write_row(T* dx, Ring& ring, Window w, int64_t r, Shape s, int n) {
  const vf *above = ring.h_row(r - 1), *here = ring.h_row(r), *below = ring.h_row(r + 1), *direct = ring.direct_row(r);
  for (int64_t j = 0; j < s.width; ++j) {
    vf v = direct[j];
    // h at row r - (i - 1), column j - (k - 1), times w at (i, k).
    v += below[j + 2] * w[0] + below[j + 1] * w[1] + below[j] * w[2];
    v += here[j + 2] * w[3] + here[j + 1] * w[4] + here[j] * w[5];
    v += above[j + 2] * w[6] + above[j + 1] * w[7] + above[j] * w[8];
    store<T, Full>(dx + (r * s.width + j) * s.channels, v, n);
  }
}

template <typename T, bool Full, bool Weights, typename Offset>
void backward_plane(const T* x, const T* dy, T* dx, const T* zero, Ring& ring, Window w, Offset b, Window& dw, vf& db,
                    Shape s, int n) {
  std::fill(ring.h.begin(), ring.h.end(), vf{});
  for (int64_t r = 0; r <= s.height; ++r) {
    if (r < s.height) {
      backward_row<T, Full, Weights, Offset>(x, dy, zero, ring, w, b, dw, db, r, s, n);
    } else {
      std::fill(ring.h_row(r), ring.h_row(r) + s.width + 2, vf{});
    }
    if (r > 0) write_row<T, Full>(dx, ring, w, r - 1, s, n);
  }
}

// Weights (9, C) of L channels from c on.
inline Window taps(const float* w, int64_t c, int64_t channels, int n) {
  Window out;
  for (int t = 0; t < 9; ++t) out[t] = load<float, false>(w + t * channels + c, n);
  return out;
}

inline vf bias(const std::optional<at::Tensor>& b, int64_t c, int n) {
  return b ? load<float, false>(b->const_data_ptr<float>() + c, n) : vf{};
}

// A channel group of a backward that has its sums: added to the thread's own (10, C), nine taps and the bias.
inline void add_sums(float* own, const Window& dw, vf db, int64_t channels, int n) {
  for (int t = 0; t < 10; ++t, own += channels) {
    store<float, false>(own, load<float, false>(own, n) + (t < 9 ? dw[t] : db), n);
  }
}

}  // namespace
