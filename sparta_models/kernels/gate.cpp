// y = x * sigmoid(g), g = b_c + 3 x 3 depthwise correlation of x with w_c, zero padding; channels_last.
//
// One pass over memory each way: the forward reads x and writes y; the backward reads x and dy, computes g again instead of
// storing it, and writes dx. A task is one image and one group of L channels, whose rows stream through
// registers: the window of 3 x 3 positions slides along a row, and three rows of the backward's terms stay in a ring.
//
//   h = dy * x * s (1 - s), s = sigmoid(g);   dx = dy * s + transposed correlation of h with w;   dw = correlation of h with x
//
// Weights come as (9, C). Arithmetic is float32 whatever the storage (float32 or bfloat16).

#include <ATen/Parallel.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include <array>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int L = 16;
#else
constexpr int L = 8;
#endif
typedef float vf __attribute__((vector_size(L * 4)));
typedef int32_t vi __attribute__((vector_size(L * 4)));
typedef uint32_t vu __attribute__((vector_size(L * 4)));
typedef uint16_t vh __attribute__((vector_size(L * 2)));

template <typename T, bool Full>
inline vf load(const T* p, int n) {
  if constexpr (std::is_same_v<T, float>) {
    vf v = {};
    std::memcpy(&v, p, (Full ? L : n) * sizeof(float));
    return v;
  } else {
    vh v = {};
    std::memcpy(&v, p, (Full ? L : n) * sizeof(uint16_t));
    return (vf)(__builtin_convertvector(v, vu) << 16);
  }
}

template <typename T, bool Full>
inline void store(T* p, vf v, int n) {
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(p, &v, (Full ? L : n) * sizeof(float));
  } else {
#ifdef __AVX512BF16__
    vh out = (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    // Round to nearest even; a NaN keeps a bit of its mantissa.
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    vh out = __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0), vh);
#endif
    std::memcpy(p, &out, (Full ? L : n) * sizeof(uint16_t));
  }
}

inline vf splat(float value) { return vf{} + value; }

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes expf), to 2 ulp.
inline vf exp_of(vf v) {
  v = v > 88.0f ? splat(88.0f) : v;
  v = v < -87.0f ? splat(-87.0f) : v;
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted = v * 1.44269504088896341f + magic;
  vf n = shifted - magic;
  vf r = v - n * 0.693359375f + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  vi scale = ((vi)shifted - 0x4b400000 + 127) << 23;
  return p * (vf)scale;
}

inline vf sigmoid(vf g) { return 1.0f / (1.0f + exp_of(-g)); }

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

template <typename T, bool Full>
void forward_plane(const T* x, T* y, const T* zero, Window w, vf b, Shape s, int n) {
  for (int64_t r = 0; r < s.height; ++r) {
    Rows<T> rows(x, zero, r, s.height, s.width, s.channels);
    Window window = {};
    rows.template enter<Full>(window, 0, s.width, n);
    for (int64_t j = 0; j < s.width; ++j) {
      rows.template enter<Full>(window, j + 1, s.width, n);
      store<T, Full>(y + (r * s.width + j) * s.channels, window[4] * sigmoid(dot(w, window, b)), n);
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

template <typename T, bool Full, bool Weights>
void backward_row(const T* x, const T* dy, const T* zero, Ring& ring, Window w, vf b, Window& dw_sum, vf& db_sum, int64_t r,
                  Shape s, int n) {
  Rows<T> rows(x, zero, r, s.height, s.width, s.channels);
  vf *__restrict h = ring.h_row(r), *__restrict direct = ring.direct_row(r);
  Window window = {};
  // Sums in locals, which no store can alias, stay in registers.
  Window dw = dw_sum;
  vf db = db_sum;
  rows.template enter<Full>(window, 0, s.width, n);
  for (int64_t j = 0; j < s.width; ++j) {
    rows.template enter<Full>(window, j + 1, s.width, n);
    vf gate = sigmoid(dot(w, window, b));
    vf through = load<T, Full>(dy + (r * s.width + j) * s.channels, n) * gate;
    vf term = through * window[4] * (1.0f - gate);
    direct[j] = through;
    h[j + 1] = term;
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

template <typename T, bool Full, bool Weights>
void backward_plane(const T* x, const T* dy, T* dx, const T* zero, Ring& ring, Window w, vf b, Window& dw, vf& db,
                    Shape s, int n) {
  std::fill(ring.h.begin(), ring.h.end(), vf{});
  for (int64_t r = 0; r <= s.height; ++r) {
    if (r < s.height) {
      backward_row<T, Full, Weights>(x, dy, zero, ring, w, b, dw, db, r, s, n);
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

vf offsets(const std::optional<at::Tensor>& b, int64_t c, int n) {
  return b ? load<float, false>(b->const_data_ptr<float>() + c, n) : vf{};
}

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
    auto plane = n == L ? forward_plane<T, true> : forward_plane<T, false>;
    plane(in + at, out + at, zero, taps(weights, c, s.channels, n), offsets(b, c, n), s, n);
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
    auto plane = partial ? (n == L ? backward_plane<T, true, true> : backward_plane<T, false, true>)
                         : (n == L ? backward_plane<T, true, false> : backward_plane<T, false, false>);
    plane(in + at, gradient + at, out + at, zero, ring, taps(weights, c, s.channels, n), offsets(b, c, n), dw, db, s, n);
    if (!partial) return;
    float* own = partial + at::get_thread_num() * 10 * s.channels + c;
    for (int t = 0; t < 10; ++t, own += s.channels) {
      store<float, false>(own, load<float, false>(own, n) + (t < 9 ? dw[t] : db), n);
    }
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
