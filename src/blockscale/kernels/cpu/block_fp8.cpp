// Block-scaled E4M3 weights on a CPU: a small-M product and a dequantizer. C ABI, no torch headers
// (they would take the compiler 20 s; this file takes it about one).
//
// Weights: n x k bytes, neighbours in a row adjacent, rows `ldw` bytes apart. Scales: float32,
// ceil(n / block_n) x ceil(k / block_k), row-major, one for each block. Activations, bias, out:
// float32 (0), bfloat16 (1) or float16 (2), `dtype`.
// Sums are float32, in an order that does not depend on the number of threads.
//
// Decoding: the seven magnitude bits of an E4M3 code, moved to where a float16 has exponent and top
// mantissa bits, are that float16 times 2^-8, subnormals included; the factor is put on the scale.
// NaN codes (0x7f, 0xff) decode to +-480: the caller refuses weights that hold them.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#define BLOCKSCALE_AVX2 1
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;
constexpr float kDecodeFactor = 256.0f;

float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The value of one code times 2^-8, exact. Written without subnormal floats, which a caller may
// have told the processor to flush.
float decode_one(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  const float magnitude = exponent == 0
      ? static_cast<float>(mantissa) * from_bits((127 - 9 - 8) << 23)
      : from_bits(static_cast<uint32_t>(exponent - 7 - 8 + 127) << 23 |
                  static_cast<uint32_t>(mantissa) << 20);
  return code & 0x80 ? -magnitude : magnitude;
}

#ifdef BLOCKSCALE_AVX2

struct Lanes {
  __m256 low, high;
};

Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }

Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

void store(float* to, Lanes lanes) {
  _mm256_storeu_ps(to, lanes.low);
  _mm256_storeu_ps(to + 8, lanes.high);
}

Lanes decode(const uint8_t* codes) {
  const __m256i wide =
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  // Sign extension fills bits 15..7 with the sign; after the shift bit 15 and bits 13..7 count.
  const __m256i half =
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xBF80)));
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(half)),
          _mm256_cvtph_ps(_mm256_extracti128_si256(half, 1))};
}

Lanes fma(Lanes a, Lanes b, Lanes c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

#else

struct Lanes {
  float lane[kLanes];
};

Lanes zero() { return {}; }

Lanes load(const float* from) {
  Lanes lanes;
  std::memcpy(lanes.lane, from, sizeof lanes.lane);
  return lanes;
}

void store(float* to, Lanes lanes) { std::memcpy(to, lanes.lane, sizeof lanes.lane); }

Lanes decode(const uint8_t* codes) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes.lane[i] = decode_one(codes[i]);
  return lanes;
}

Lanes fma(Lanes a, Lanes b, Lanes c) {
  for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
  return c;
}

Lanes broadcast(float value) {
  Lanes lanes;
  for (float& lane : lanes.lane) lane = value;
  return lanes;
}

#endif

float sum(Lanes lanes) {
  float lane[kLanes];
  store(lane, lanes);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}

float half_to_float(uint16_t half) {
#ifdef BLOCKSCALE_AVX2
  return _cvtsh_ss(half);
#else
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, mantissa = half & 1023;
  if (exponent == 31) return from_bits(sign | 0x7F800000u | mantissa << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

uint16_t float_to_half(float value) {
#ifdef BLOCKSCALE_AVX2
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < 0x38800000u) {  // Below 2^-14: adding 0.5 rounds at float16's subnormal step.
    const uint32_t rounded = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  const uint32_t odd = magnitude >> 13 & 1;
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xFFFu + odd) >> 13);
#endif
}

uint16_t float_to_bfloat(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

float read(const void* from, int64_t index, int dtype) {
  if (dtype == 0) return static_cast<const float*>(from)[index];
  const uint16_t bits = static_cast<const uint16_t*>(from)[index];
  return dtype == 1 ? from_bits(static_cast<uint32_t>(bits) << 16) : half_to_float(bits);
}

void write(void* to, int64_t index, int dtype, float value) {
  if (dtype == 0) {
    static_cast<float*>(to)[index] = value;
  } else {
    static_cast<uint16_t*>(to)[index] =
        dtype == 1 ? float_to_bfloat(value) : float_to_half(value);
  }
}

struct Weight {
  const uint8_t* data;
  const float* scales;
  int64_t n, k, ldw, block_n, block_k, blocks_k;

  const uint8_t* row(int64_t index) const { return data + index * ldw; }

  const float* scale_row(int64_t row) const { return scales + row / block_n * blocks_k; }
};

// Dot products of `Rows` weight rows with `Tokens` activation rows, into result[row][token].
template <int Rows, int Tokens>
void dot(const Weight& w, int64_t row, const float* x, float (&result)[Rows][Tokens]) {
  Lanes total[Rows][Tokens];
  float tail[Rows][Tokens] = {};
  for (auto& totals : total)
    for (Lanes& lanes : totals) lanes = zero();
  for (int64_t block = 0; block < w.blocks_k; ++block) {
    const int64_t begin = block * w.block_k, end = std::min(begin + w.block_k, w.k);
    Lanes partial[Rows][Tokens];
    for (auto& partials : partial)
      for (Lanes& lanes : partials) lanes = zero();
    int64_t column = begin;
    for (; column + kLanes <= end; column += kLanes) {
      for (int r = 0; r < Rows; ++r) {
        const Lanes codes = decode(w.row(row + r) + column);
        for (int t = 0; t < Tokens; ++t)
          partial[r][t] = fma(codes, load(x + t * w.k + column), partial[r][t]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      const float scale = w.scale_row(row + r)[block] * kDecodeFactor;
      for (int t = 0; t < Tokens; ++t) {
        total[r][t] = fma(partial[r][t], broadcast(scale), total[r][t]);
        float rest = 0.0f;
        for (int64_t c = column; c < end; ++c)
          rest += decode_one(w.row(row + r)[c]) * x[t * w.k + c];
        tail[r][t] += rest * scale;
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int t = 0; t < Tokens; ++t) result[r][t] = sum(total[r][t]) + tail[r][t];
}

struct Product {
  Weight weight;
  const float* x;
  const void* bias;
  void* out;
  int dtype;
  int64_t m;
};

template <int Rows, int Tokens>
void rows_by_tokens(const Product& p, int64_t row, int64_t token) {
  float result[Rows][Tokens];
  dot<Rows, Tokens>(p.weight, row, p.x + token * p.weight.k, result);
  for (int r = 0; r < Rows; ++r) {
    const float bias = p.bias ? read(p.bias, row + r, p.dtype) : 0.0f;
    for (int t = 0; t < Tokens; ++t)
      write(p.out, (token + t) * p.weight.n + row + r, p.dtype, result[r][t] + bias);
  }
}

// Four independent rows hide the latency of a fused multiply-add for one token; for several tokens
// two rows by four keep every decoded vector busy without spilling sixteen registers.
constexpr int kGroupRows = 4;

// Four short row streams defeat the hardware prefetcher. Asking for the next group's lines took a
// cold 1536x576 layer from 209 to 112 us (AMD EPYC, 2 vCPU, 2026-11-23).
constexpr int64_t kCacheLine = 64;

int64_t prefetch_distance(int64_t ldw) { return std::min<int64_t>(kGroupRows * ldw, 4096); }

void one_group(const Product& p, int64_t row) {
  const int64_t rows = std::min<int64_t>(kGroupRows, p.weight.n - row);
  const int64_t ahead = prefetch_distance(p.weight.ldw);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t byte = 0; byte < p.weight.k; byte += kCacheLine)
      __builtin_prefetch(p.weight.row(row + r) + ahead + byte);
  int64_t token = 0;
  for (; token + 4 <= p.m; token += 4)
    for (int64_t r = 0; r < rows; ++r) rows_by_tokens<1, 4>(p, row + r, token);
  for (; token < p.m; ++token) {
    if (rows == kGroupRows) {
      rows_by_tokens<kGroupRows, 1>(p, row, token);
    } else {
      for (int64_t r = 0; r < rows; ++r) rows_by_tokens<1, 1>(p, row + r, token);
    }
  }
}

}  // namespace

extern "C" {

// Changes whenever the functions below change; the loader compares it.
int blockscale_abi() { return 3; }

// out[m, n] = x[m, k] * weight[n, k]^T + bias, all float tensors of `dtype`; x rows are `ldx`
// elements apart, weight rows `ldw`.
void blockscale_product(const void* x, const uint8_t* data, const float* scales, const void* bias,
                        void* out, int dtype, int64_t m, int64_t n, int64_t k, int64_t ldx,
                        int64_t ldw, int64_t block_n, int64_t block_k, int threads) {
  std::vector<float> wide(static_cast<size_t>(m * k));
  for (int64_t token = 0; token < m; ++token)
    for (int64_t c = 0; c < k; ++c) wide[token * k + c] = read(x, token * ldx + c, dtype);
  const Weight weight{data, scales, n, k, ldw, block_n, block_k, (k + block_k - 1) / block_k};
  const Product product{weight, wide.data(), bias, out, dtype, m};
  const int64_t groups = (n + kGroupRows - 1) / kGroupRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t group = 0; group < groups; ++group) one_group(product, group * kGroupRows);
}

// The same for several experts of a stack: segment i is (expert, first row, rows) in `segments`,
// and multiplies those rows of x and out. Weights are `expert_stride` bytes apart, scales
// `scale_stride` floats. Rows outside all segments are neither read nor written.
void blockscale_grouped_product(const void* x, const uint8_t* data, const float* scales, void* out,
                                const int64_t* segments, int dtype, int64_t count, int64_t n,
                                int64_t k, int64_t ldx, int64_t ldw, int64_t expert_stride,
                                int64_t scale_stride, int64_t block_n, int64_t block_k,
                                int threads) {
  int64_t rows = 0;
  for (int64_t i = 0; i < count; ++i) rows += segments[3 * i + 2];
  std::vector<float> wide(static_cast<size_t>(rows * k));
  std::vector<Product> products;
  products.reserve(static_cast<size_t>(count));
  float* next = wide.data();
  const int64_t blocks_k = (k + block_k - 1) / block_k, bytes = dtype == 0 ? 4 : 2;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t expert = segments[3 * i], first = segments[3 * i + 1], m = segments[3 * i + 2];
    for (int64_t row = 0; row < m; ++row)
      for (int64_t c = 0; c < k; ++c)
        next[row * k + c] = read(x, (first + row) * ldx + c, dtype);
    const Weight weight{data + expert * expert_stride, scales + expert * scale_stride,
                        n, k, ldw, block_n, block_k, blocks_k};
    char* rows_out = static_cast<char*>(out) + first * n * bytes;
    products.push_back({weight, next, nullptr, rows_out, dtype, m});
    next += m * k;
  }
  const int64_t groups = (n + kGroupRows - 1) / kGroupRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t item = 0; item < count * groups; ++item)
    one_group(products[item / groups], item % groups * kGroupRows);
}

// out[rows, k] = the float32 values of weight rows [first, first + rows).
void blockscale_dequantize(const uint8_t* data, const float* scales, float* out, int64_t first,
                           int64_t rows, int64_t k, int64_t ldw, int64_t block_n, int64_t block_k,
                           int threads) {
  const int64_t blocks_k = (k + block_k - 1) / block_k;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* codes = data + (first + row) * ldw;
    const float* scale_row = scales + (first + row) / block_n * blocks_k;
    float* values = out + row * k;
    for (int64_t block = 0; block < blocks_k; ++block) {
      const int64_t end = std::min((block + 1) * block_k, k);
      int64_t c = block * block_k;
      // The factor is undone before the scale: data x scale is one rounding, as in the reference.
      for (; c + kLanes <= end; c += kLanes) {
        const Lanes exact = fma(decode(codes + c), broadcast(kDecodeFactor), zero());
        store(values + c, fma(exact, broadcast(scale_row[block]), zero()));
      }
      for (; c < end; ++c) values[c] = decode_one(codes[c]) * kDecodeFactor * scale_row[block];
    }
  }
}

}  // extern "C"
