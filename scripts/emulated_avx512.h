// The AVX-512 intrinsics that the kernels use, made of AVX2 and plain loops, so that their code can
// be tested on processors without those instructions (scripts/emulate_avx512.sh). Included between
// <immintrin.h> and the kernels: a name in their namespace hides the compiler's.
//
// Only what the kernels call is here: a call of anything else does not compile. Where instructions
// flush subnormals, these do.

#pragma once

#include <cstdint>
#include <cstring>

namespace halfbyte::avx512 {
namespace {

template <typename T>
struct Lanes {
  static constexpr int kCount = 64 / int(sizeof(T));
  T at[kCount];
};

template <typename T, typename Register>
Lanes<T> lanes_of(Register r) {
  Lanes<T> lanes{};
  std::memcpy(&lanes, &r, sizeof r);
  return lanes;
}

template <typename Register, typename T>
Register register_of(const Lanes<T>& lanes) {
  Register r;
  std::memcpy(&r, &lanes, sizeof r);
  return r;
}

template <typename T, typename Register, typename Make>
Register make(Make value) {
  Lanes<T> lanes;
  for (int i = 0; i < Lanes<T>::kCount; ++i) lanes.at[i] = T(value(i));
  return register_of<Register>(lanes);
}

template <typename T, typename Register, typename Combine>
Register each(Register a, Register b, Combine combine) {
  const auto x = lanes_of<T>(a), y = lanes_of<T>(b);
  return make<T, Register>([&](int i) { return combine(x.at[i], y.at[i]); });
}

template <typename T, typename Register>
Register choose(uint64_t mask, Register if_set, Register otherwise) {
  const auto x = lanes_of<T>(if_set), y = lanes_of<T>(otherwise);
  return make<T, Register>([&](int i) { return mask >> i & 1 ? x.at[i] : y.at[i]; });
}

template <typename Register>
Register load_register(const void* p) {
  Register r;
  std::memcpy(&r, p, sizeof r);
  return r;
}

// Lanes of the mask alone are touched in memory.
template <typename T, typename Register>
Register load_masked(uint64_t mask, const void* p) {
  Register r{};
  T at[sizeof(Register) / sizeof(T)] = {};
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(&at[i], static_cast<const char*>(p) + i * sizeof(T), sizeof(T));
  }
  std::memcpy(&r, at, sizeof r);
  return r;
}

template <typename T, typename Register>
void store_masked(void* p, uint64_t mask, Register r) {
  T at[sizeof(Register) / sizeof(T)];
  std::memcpy(at, &r, sizeof r);
  for (size_t i = 0; i < sizeof(Register) / sizeof(T); ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<char*>(p) + i * sizeof(T), &at[i], sizeof(T));
  }
}

__m256 half_of(__m512 v, int half) {
  __m256 r;
  std::memcpy(&r, reinterpret_cast<const char*>(&v) + 32 * half, sizeof r);
  return r;
}
__m512 joined(__m256 low, __m256 high) {
  __m512 r;
  std::memcpy(&r, &low, sizeof low);
  std::memcpy(reinterpret_cast<char*>(&r) + 32, &high, sizeof high);
  return r;
}

// Constants, moves, casts.
__m512 _mm512_setzero_ps() { return __m512{}; }
__m512i _mm512_setzero_si512() { return __m512i{}; }
__m512 _mm512_set1_ps(float x) { return x - __m512{}; }
__m512d _mm512_set1_pd(double x) { return x - __m512d{}; }
__m512i _mm512_set1_epi8(int8_t x) {
  return make<int8_t, __m512i>([=](int) { return x; });
}
__m512i _mm512_set1_epi16(int16_t x) {
  return make<int16_t, __m512i>([=](int) { return x; });
}
__m512i _mm512_set1_epi32(int32_t x) {
  return make<int32_t, __m512i>([=](int) { return x; });
}
__m512i _mm512_set1_epi64(int64_t x) {
  return make<int64_t, __m512i>([=](int) { return x; });
}
template <typename... T>
__m512i _mm512_set_epi32(T... from_last) {
  const int32_t values[16] = {from_last...};
  return make<int32_t, __m512i>([&](int i) { return values[15 - i]; });
}
template <typename... T>
__m512i _mm512_set_epi64(T... from_last) {
  const int64_t values[8] = {from_last...};
  return make<int64_t, __m512i>([&](int i) { return values[7 - i]; });
}
__m512i _mm512_maskz_set1_epi32(__mmask16 mask, int32_t x) {
  return choose<int32_t>(mask, _mm512_set1_epi32(x), __m512i{});
}
__m512i _mm512_mask_set1_epi32(__m512i otherwise, __mmask16 mask, int32_t x) {
  return choose<int32_t>(mask, _mm512_set1_epi32(x), otherwise);
}
__m512i _mm512_castps_si512(__m512 v) { return (__m512i)v; }
__m512 _mm512_castsi512_ps(__m512i v) { return (__m512)v; }
__m128i _mm512_castsi512_si128(__m512i v) { return load_register<__m128i>(&v); }
__m256 _mm512_castps512_ps256(__m512 v) { return half_of(v, 0); }
__m512i _mm512_castsi256_si512(__m256i v) { return (__m512i)joined((__m256)v, __m256{}); }
float _mm512_cvtss_f32(__m512 v) { return v[0]; }
__m256 _mm512_extractf32x8_ps(__m512 v, int half) { return half_of(v, half); }
__m512i _mm512_inserti64x4(__m512i v, __m256i part, int half) {
  std::memcpy(reinterpret_cast<char*>(&v) + 32 * half, &part, sizeof part);
  return v;
}
__m512i _mm512_broadcast_i64x4(__m256i v) { return (__m512i)joined((__m256)v, (__m256)v); }
__m512i _mm512_broadcast_i32x4(__m128i v) {
  return _mm512_broadcast_i64x4(_mm256_broadcastsi128_si256(v));
}

// Memory.
__m512 _mm512_loadu_ps(const void* p) { return load_register<__m512>(p); }
__m512d _mm512_loadu_pd(const void* p) { return load_register<__m512d>(p); }
__m512i _mm512_loadu_si512(const void* p) { return load_register<__m512i>(p); }
void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, sizeof v); }
void _mm512_store_ps(void* p, __m512 v) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
  std::memcpy(p, &v, sizeof v);
}
void _mm512_storeu_si512(void* p, __m512i v) { std::memcpy(p, &v, sizeof v); }
__m512 _mm512_maskz_loadu_ps(__mmask16 m, const void* p) {
  return load_masked<float, __m512>(m, p);
}
__m512i _mm512_mask_loadu_epi32(__m512i otherwise, __mmask16 m, const void* p) {
  return choose<int32_t>(m, load_masked<int32_t, __m512i>(m, p), otherwise);
}
__m256i _mm256_maskz_loadu_epi16(__mmask16 m, const void* p) {
  return load_masked<int16_t, __m256i>(m, p);
}
__m128i _mm_maskz_loadu_epi8(__mmask16 m, const void* p) {
  return load_masked<int8_t, __m128i>(m, p);
}
void _mm512_mask_storeu_ps(void* p, __mmask16 m, __m512 v) { store_masked<float>(p, m, v); }
void _mm512_mask_storeu_epi16(void* p, __mmask32 m, __m512i v) { store_masked<int16_t>(p, m, v); }
void _mm256_mask_storeu_epi16(void* p, __mmask16 m, __m256i v) { store_masked<int16_t>(p, m, v); }
void _mm_mask_storeu_epi8(void* p, __mmask16 m, __m128i v) { store_masked<int8_t>(p, m, v); }
__m512i _mm512_i32gather_epi32(__m512i index, const void* base, int scale) {
  const auto at = lanes_of<int32_t>(index);
  return make<int32_t, __m512i>([&](int i) {
    int32_t x;
    std::memcpy(&x, static_cast<const char*>(base) + int64_t(at.at[i]) * scale, sizeof x);
    return x;
  });
}
__m512 _mm512_i32gather_ps(__m512i index, const void* base, int scale) {
  return (__m512)_mm512_i32gather_epi32(index, base, scale);
}

// Arithmetic.
__m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
__m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
__m512d _mm512_mul_pd(__m512d a, __m512d b) { return a * b; }
__m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return joined(_mm256_fmadd_ps(half_of(a, 0), half_of(b, 0), half_of(c, 0)),
                _mm256_fmadd_ps(half_of(a, 1), half_of(b, 1), half_of(c, 1)));
}
__m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
__m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
__m512i _mm512_mask_add_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return choose<int32_t>(mask, _mm512_add_epi32(a, b), otherwise);
}
__m512i _mm512_mask_sub_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return choose<int32_t>(mask, _mm512_sub_epi32(a, b), otherwise);
}
__m512i _mm512_max_epu32(__m512i a, __m512i b) {
  return each<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}
__m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return each<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; });
}
__m512i _mm512_min_epi32(__m512i a, __m512i b) {
  return each<int32_t>(a, b, [](int32_t x, int32_t y) { return x < y ? x : y; });
}
uint32_t _mm512_reduce_max_epu32(__m512i v) {
  uint32_t most = 0;
  for (const uint32_t x : lanes_of<uint32_t>(v).at) most = x > most ? x : most;
  return most;
}

// Bits.
__m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
__m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
__m512i _mm512_mask_or_epi32(__m512i otherwise, __mmask16 mask, __m512i a, __m512i b) {
  return choose<int32_t>(mask, a | b, otherwise);
}
__m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int truth) {
  __m512i result{};
  for (int row = 0; row < 8; ++row) {
    if (!(truth >> row & 1)) continue;
    result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}
__m512i _mm512_srli_epi16(__m512i v, unsigned by) {
  return each<uint16_t>(v, v, [=](uint16_t x, uint16_t) { return by > 15 ? 0 : x >> by; });
}
__m512i _mm512_srli_epi32(__m512i v, unsigned by) {
  return each<uint32_t>(v, v, [=](uint32_t x, uint32_t) { return by > 31 ? 0 : x >> by; });
}
__m512i _mm512_slli_epi32(__m512i v, unsigned by) {
  return each<uint32_t>(v, v, [=](uint32_t x, uint32_t) { return by > 31 ? 0 : x << by; });
}
__m512i _mm512_srli_epi64(__m512i v, unsigned by) {
  return each<uint64_t>(v, v, [=](uint64_t x, uint64_t) { return by > 63 ? 0 : x >> by; });
}
__m512i _mm512_slli_epi64(__m512i v, unsigned by) {
  return each<uint64_t>(v, v, [=](uint64_t x, uint64_t) { return by > 63 ? 0 : x << by; });
}
__m512i _mm512_srlv_epi16(__m512i v, __m512i by) {
  return each<uint16_t>(v, by, [](uint16_t x, uint16_t n) { return n > 15 ? 0 : x >> n; });
}
__m512i _mm512_srlv_epi32(__m512i v, __m512i by) {
  return each<uint32_t>(v, by, [](uint32_t x, uint32_t n) { return n > 31 ? 0 : x >> n; });
}
__mmask16 _mm512_movepi32_mask(__m512i v) {
  const auto lanes = lanes_of<uint32_t>(v);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (lanes.at[i] >> 31) << i;
  return __mmask16(mask);
}
__mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    bool holds = false;
    if (predicate == _CMP_NGE_UQ) {
      holds = !(a[i] >= b[i]);
    } else if (predicate == _CMP_UNORD_Q) {
      holds = __builtin_isunordered(a[i], b[i]);
    } else if (predicate == _CMP_LT_OQ) {
      holds = a[i] < b[i];
    } else {
      __builtin_trap();
    }
    mask |= unsigned(holds) << i;
  }
  return __mmask16(mask);
}

// Shuffles.
template <typename T>
__m512i permuted(__m512i index, __m512i v) {
  const auto from = lanes_of<T>(index), x = lanes_of<T>(v);
  return make<T, __m512i>([&](int i) { return x.at[from.at[i] & (Lanes<T>::kCount - 1)]; });
}
__m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) { return permuted<uint16_t>(index, v); }
__m512i _mm512_permutexvar_epi32(__m512i index, __m512i v) { return permuted<uint32_t>(index, v); }
__m512 _mm512_permutexvar_ps(__m512i index, __m512 v) {
  return (__m512)permuted<uint32_t>(index, (__m512i)v);
}
__m512i _mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  const auto from = lanes_of<uint16_t>(index), x = lanes_of<uint16_t>(a), y = lanes_of<uint16_t>(b);
  return make<uint16_t, __m512i>(
      [&](int i) { return from.at[i] & 32 ? y.at[from.at[i] & 31] : x.at[from.at[i] & 31]; });
}
__m512i _mm512_shuffle_epi8(__m512i v, __m512i index) {
  const auto x = lanes_of<uint8_t>(v), from = lanes_of<uint8_t>(index);
  return make<uint8_t, __m512i>(
      [&](int i) { return from.at[i] & 0x80 ? uint8_t(0) : x.at[(i & ~15) + (from.at[i] & 15)]; });
}
__m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int which) {
  const auto x = lanes_of<uint64_t>(a), y = lanes_of<uint64_t>(b);
  return make<uint64_t, __m512i>([&](int i) {
    const int quarter = which >> (i / 2 * 2) & 3;
    return (i < 4 ? x : y).at[2 * quarter + i % 2];
  });
}

// Conversions.
__m512i _mm512_cvtepu8_epi32(__m128i v) {
  const auto x = lanes_of<uint8_t>(v);
  return make<uint32_t, __m512i>([&](int i) { return x.at[i]; });
}
__m512i _mm512_cvtepu16_epi32(__m256i v) {
  const auto x = lanes_of<uint16_t>(v);
  return make<uint32_t, __m512i>([&](int i) { return x.at[i]; });
}
template <typename To, typename From, typename Register>
Register truncated(__m512i v) {
  const auto x = lanes_of<From>(v);
  Lanes<To> result{};
  for (int i = 0; i < Lanes<From>::kCount; ++i) result.at[i] = To(x.at[i]);
  return load_register<Register>(&result);
}
__m256i _mm512_cvtepi32_epi16(__m512i v) { return truncated<uint16_t, uint32_t, __m256i>(v); }
__m128i _mm512_cvtepi32_epi8(__m512i v) { return truncated<uint8_t, uint32_t, __m128i>(v); }
__m128i _mm512_cvtepi64_epi8(__m512i v) { return truncated<uint8_t, uint64_t, __m128i>(v); }
__m512 _mm512_cvtph_ps(__m256i v) {
  return joined(_mm256_cvtph_ps(_mm256_castsi256_si128(v)),
                _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
__m256i _mm512_cvtps_ph(__m512 v, int) {
  return _mm256_set_m128i(_mm256_cvtps_ph(half_of(v, 1), _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(half_of(v, 0), _MM_FROUND_TO_NEAREST_INT));
}
__m256 _mm512_cvt_roundpd_ps(__m512d v, int rounding) {
  if ((rounding & 7) != _MM_FROUND_TO_NEG_INF) __builtin_trap();
  __m256 r;
  for (int i = 0; i < 8; ++i) {
    float x = float(v[i]);
    if (double(x) > v[i]) x = __builtin_nextafterf(x, -__builtin_inff());
    r[i] = x;
  }
  return r;
}

// bfloat16. As the instructions: nearest, ties to even; subnormals are zeros of their sign.
float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return flushed(value);
}
uint16_t narrowed(float x) {
  const float value = flushed(x);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
__m256bh _mm512_cvtneps_pbh(__m512 v) {
  Lanes<uint16_t> result{};
  for (int i = 0; i < 16; ++i) result.at[i] = narrowed(v[i]);
  return load_register<__m256bh>(&result);
}
__m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return make<uint16_t, __m512bh>([&](int i) { return narrowed(i < 16 ? low[i] : high[i - 16]); });
}
__m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto x = lanes_of<uint16_t>(a), y = lanes_of<uint16_t>(b);
  return make<float, __m512>([&](int i) {
    // A product of two bfloat16 numbers is exact in float32, unless it is subnormal or overflows.
    float r = flushed(sum[i]);
    for (int j = 2 * i + 1; j >= 2 * i; --j) r = flushed(r + widened(x.at[j]) * widened(y.at[j]));
    return r;
  });
}

}  // namespace
}  // namespace halfbyte::avx512
