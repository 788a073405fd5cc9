// CPU selections, sums by latent and updates for native.py: plain C functions with OpenMP threads.
//
// B rows, C columns of a chunk, K keys kept per row; N latents, E entries, D columns of a weight.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

constexpr int kLanes = 16;  // elements of a vector
constexpr int64_t kRun = 512;  // rows per partial sum; longer fp32 sums lose digits
constexpr int kBlock = 64;  // columns that are compared with the bound in one go

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));
typedef int32_t Flags __attribute__((vector_size(4 * kLanes)));

// Map floats to integers in the same order. -0 counts as 0.
inline int32_t ordered(float value) {
    value += 0.0f;
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

struct BFloat16 {
    uint16_t bits;  // the high half of a float's bits
};

inline float value_of(float x) { return x; }

inline float value_of(BFloat16 x) {
    const uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
    float result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

inline Floats load(const float* x) {
    Floats result;
    std::memcpy(&result, x, sizeof result);
    return result;
}

inline Floats load(const BFloat16* x) {
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    const Words wide = __builtin_convertvector(halves, Words) << 16;
    Floats result;
    std::memcpy(&result, &wide, sizeof result);
    return result;
}

// Round only once if the processor has fma. Nothing else is fused (see the flags in native.py).
inline float fma(float a, float b, float c) {
#ifdef FP_FAST_FMAF
    return std::fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Round to nearest even. NaN stays NaN.
inline uint16_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return value == value ? rounded : 0x7fc0;
}

inline bool all_ones(Flags flags) {
    int64_t pairs[kLanes / 2], all = -1;
    std::memcpy(pairs, &flags, sizeof pairs);
    for (const int64_t pair : pairs) all &= pair;
    return all == -1;
}

// Return whether any of kBlock sums x + bias exceeds its bound.
template <typename T>
inline bool any_exceeds(const T* x, const float* bias, const float* bounds) {
    Flags within = ~(load(x) + load(bias) > load(bounds));
    for (int i = kLanes; i < kBlock; i += kLanes)
        within &= ~(load(x + i) + load(bias + i) > load(bounds + i));
    return !all_ones(within);
}

// Return whether any of kBlock sums x + bias reaches a bound or is NaN.
template <typename T>
inline bool any_reaches(const T* x, const float* bias, float bound) {
    const Floats bounds = bound - Floats{};
    Flags within = load(x) + load(bias) < bounds;
    for (int i = kLanes; i < kBlock; i += kLanes) within &= load(x + i) + load(bias + i) < bounds;
    return !all_ones(within);
}

template <typename T>
inline float largest(const T* x, const float* bias) {
    Floats most = load(x) + load(bias);
    for (int i = kLanes; i < kBlock; i += kLanes) {
        const Floats sums = load(x + i) + load(bias + i);
        most = sums > most ? sums : most;
    }
    float values[kLanes];
    std::memcpy(values, &most, sizeof values);
    const float result = *std::max_element(values, values + kLanes);
    return std::isnan(result) ? INFINITY : result;  // NaN ranks before all numbers
}

inline float value_of_key(int64_t key) {
    const int32_t high = static_cast<int32_t>(key >> 32);
    const int32_t bits = high ^ ((high >> 31) & 0x7fffffff);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Keys are those of keys.py: (ordered value, complement of the latent).
template <typename T>
void keep_largest(int64_t* best, const T* products, const float* bias, const int64_t* latents,
                  int64_t B, int64_t C, int64_t K, int threads) {
    const int64_t room = std::max<int64_t>(4 * K, 32);
#pragma omp parallel num_threads(threads)
    {
        std::vector<int64_t> keys(room);
        std::vector<float> peaks;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < B; ++b) {
            const T* row = products + b * C;
            std::copy(best + b * K, best + (b + 1) * K, keys.begin());
            int64_t n = K;
            // A value equal to the bound may belong to a lower latent, so its key must be compared.
            int64_t least = *std::min_element(keys.begin(), keys.begin() + K);
            bool bounded = least != INT64_MIN;
            float bound = bounded ? value_of_key(least) : 0.0f;
            if (!bounded && C >= 2 * K * kBlock) {
                // The K-th largest of the block maxima is a bound: K blocks have a value >= it.
                peaks.clear();
                for (int64_t c = 0; c + kBlock <= C; c += kBlock)
                    peaks.push_back(largest(row + c, bias + c));
                std::nth_element(peaks.begin(), peaks.begin() + K - 1, peaks.end(),
                                 std::greater<float>());
                bound = peaks[K - 1];
                bounded = true;
            }
            auto cut = [&] {
                std::nth_element(keys.begin(), keys.begin() + K - 1, keys.begin() + n,
                                 std::greater<int64_t>());
                n = K;
                least = keys[K - 1];
                if (least == INT64_MIN) return;
                bounded = true;
                bound = value_of_key(least);
            };
            auto look_at = [&](int64_t c) {
                const float value = value_of(row[c]) + bias[c];
                if (bounded && value < bound) return;
                keys[n++] = (static_cast<int64_t>(ordered(value)) << 32) |
                            (0xffffffffLL - latents[c]);
                if (n == room) cut();
            };
            int64_t c = 0;
            for (; c + kBlock <= C; c += kBlock) {
                if (bounded && !any_reaches(row + c, bias + c, bound)) continue;
                for (int64_t i = c; i < c + kBlock; ++i) look_at(i);
                if (!bounded && n >= 2 * K) cut();  // get a bound early
            }
            for (; c < C; ++c) look_at(c);
            if (n > K) cut();
            std::copy(keys.begin(), keys.begin() + K, best + b * K);
        }
    }
}

// Sum squares in torch's order: eight interleaved partial sums, which are then added up.
inline float norm(const float* x, int64_t D) {
    constexpr int kSums = 8;
    float sums[kSums] = {};
    int64_t d = 0;
    for (; d + kSums <= D; d += kSums)
        for (int i = 0; i < kSums; ++i) sums[i] += x[d + i] * x[d + i];
    for (int i = 1; i < kSums; ++i) sums[0] += sums[i];
    for (; d < D; ++d) sums[0] += x[d] * x[d];
    return std::sqrt(sums[0]);
}

// Find the sums products [B, C] + bias [C] above their column's bound, ordered by row and column.
// Write as many as there is room for, and write their total number to count.
template <typename T>
void above(int64_t* count, float* values, int32_t* rows, int32_t* columns, const T* products,
           const float* bias, const float* bounds, int64_t B, int64_t C, int64_t room,
           int threads) {
    struct Found {
        float value;
        int32_t row, column;
    };
    std::vector<std::vector<Found>> found(threads);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int part = 0; part < threads; ++part) {  // consecutive rows, to keep row order
        std::vector<Found>& here = found[part];
        for (int64_t b = part * B / threads; b < (part + 1) * B / threads; ++b) {
            const T* row = products + b * C;
            auto look_at = [&](int64_t c) {
                const float value = value_of(row[c]) + bias[c];
                if (value > bounds[c])
                    here.push_back({value, static_cast<int32_t>(b), static_cast<int32_t>(c)});
            };
            int64_t c = 0;
            for (; c + kBlock <= C; c += kBlock)
                if (any_exceeds(row + c, bias + c, bounds + c))
                    for (int64_t i = c; i < c + kBlock; ++i) look_at(i);
            for (; c < C; ++c) look_at(c);
        }
    }
    *count = 0;
    for (const std::vector<Found>& part : found) {
        for (const Found& each : part) {
            if (*count < room) {
                values[*count] = each.value;
                rows[*count] = each.row;
                columns[*count] = each.column;
            }
            ++*count;
        }
    }
}

}  // namespace

extern "C" {

void above_bf16(int64_t* count, float* values, int32_t* rows, int32_t* columns,
                const void* products, const float* bias, const float* bounds, int64_t B, int64_t C,
                int64_t room, int threads) {
    above(count, values, rows, columns, static_cast<const BFloat16*>(products), bias, bounds, B, C,
          room, threads);
}

void above_fp32(int64_t* count, float* values, int32_t* rows, int32_t* columns,
                const void* products, const float* bias, const float* bounds, int64_t B, int64_t C,
                int64_t room, int threads) {
    above(count, values, rows, columns, static_cast<const float*>(products), bias, bounds, B, C,
          room, threads);
}

// Replace best [B, K] by the K largest of best and of products [B, C] + bias [C], for latents [C].
void keep_largest_bf16(int64_t* best, const void* products, const float* bias,
                       const int64_t* latents, int64_t B, int64_t C, int64_t K, int threads) {
    keep_largest(best, static_cast<const BFloat16*>(products), bias, latents, B, C, K, threads);
}

void keep_largest_fp32(int64_t* best, const void* products, const float* bias,
                       const int64_t* latents, int64_t B, int64_t C, int64_t K, int threads) {
    keep_largest(best, static_cast<const float*>(products), bias, latents, B, C, K, threads);
}

// out[n] = sum of coefficients[e] * rows[sources[e]] over the entries e of latent n. If W and along
// are not null, along[n] * W[n] is subtracted for each latent n with entries.
void sum_by_latent_fp32(float* out, const float* coefficients, const int64_t* sources,
                        const int64_t* starts, const float* rows, const float* W,
                        const float* along, int64_t N, int64_t E, int64_t D, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> part(D);
#pragma omp for schedule(dynamic, 64)
        for (int64_t n = 0; n < N; ++n) {
            float* sum = out + n * D;
            const int64_t end = n + 1 < N ? starts[n + 1] : E;
            std::memset(sum, 0, D * sizeof *sum);
            if (starts[n] == end) continue;
            for (int64_t first = starts[n]; first < end; first += kRun) {
                // The first run is summed in place, later runs in a buffer that is then added.
                float* to = first == starts[n] ? sum : part.data();
                if (to != sum) std::memset(to, 0, D * sizeof *to);
                for (int64_t e = first; e < std::min(first + kRun, end); ++e) {
                    const float* row = rows + sources[e] * D;
                    const float c = coefficients[e];
                    for (int64_t d = 0; d < D; ++d) to[d] = fma(c, row[d], to[d]);
                }
                if (to != sum)
                    for (int64_t d = 0; d < D; ++d) sum[d] += to[d];
            }
            if (W != nullptr)
                for (int64_t d = 0; d < D; ++d) sum[d] = fma(-along[n], W[n * D + d], sum[d]);
        }
    }
}

// Update W [N, D] by Adam with the gradient over `scale`, with torch's roundings. Do nothing if
// `found_inf`. If `unit_rows`, normalize the rows. If `copy` is not null, write W to it as bf16.
void update_fp32(float* W, const float* gradient, float* exp_avg, float* exp_avg_sq, uint16_t* copy,
                 const float* scale, const float* found_inf, int64_t N, int64_t D,
                 int64_t unit_rows, double step_size, double root, double beta1, double beta2,
                 double eps, int threads) {
    if (*found_inf) return;
    const float by = -step_size, divisor = *scale, of_root = root, least = eps;
    const float new1 = 1 - beta1, kept2 = beta2, new2 = 1 - beta2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        float* __restrict w = W + n * D;
        const float* __restrict g = gradient + n * D;
        float* __restrict m = exp_avg + n * D;
        float* __restrict v = exp_avg_sq + n * D;
        for (int64_t d = 0; d < D; ++d) {
            const float here = g[d] / divisor;
            m[d] = fma(new1, here - m[d], m[d]);
            v[d] = fma(new2 * here, here, v[d] * kept2);
            w[d] += by * m[d] / (std::sqrt(v[d]) / of_root + least);
        }
        if (unit_rows) {
            const float length = std::max(norm(w, D), std::numeric_limits<float>::min());
            for (int64_t d = 0; d < D; ++d) w[d] /= length;
        }
        if (copy != nullptr) {
            uint16_t* __restrict to = copy + n * D;
            for (int64_t d = 0; d < D; ++d) to[d] = to_bf16(w[d]);
        }
    }
}
}
