// Every kernel against sums in double, in buffers of exactly the right size, so that a sanitizer sees one step too far.
// Built by `build.py test` with all instruction sets compiled for the machine at hand (HFS_EMULATED).
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../hf_sparse_kernels.h"

namespace {

int failures = 0, cases = 0;

// A thread per share: stands in for the OpenMP runtime of the process.
void fork_join(void (*work)(void*), void* data, unsigned threads, unsigned) {
    std::vector<std::thread> pool;
    for (unsigned i = 1; i < threads; i++) pool.emplace_back(work, data);
    work(data);
    for (std::thread& thread : pool) thread.join();
}

float from_bf16(uint16_t h) {
    const uint32_t bits = (uint32_t)h << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}
uint16_t to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

double activate(double x, int activation) {
    switch (activation) {
        case HFS_GELU: return 0.5 * x * (1 + erf(x / sqrt(2.0)));
        case HFS_GELU_TANH: return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
        case HFS_SILU: return x / (1 + exp(-x));
        case HFS_RELU: return x > 0 ? x : 0;
        default: return x;
    }
}

// Numbers in memory of either type, in a buffer with nothing behind it.
struct Buffer {
    int dtype;
    size_t size;
    std::unique_ptr<unsigned char[]> bytes;

    Buffer(int type, size_t count)
        : dtype(type), size(count), bytes(new unsigned char[count * (type == HFS_FLOAT32 ? 4 : 2)]) {}
    double get(size_t i) const {
        if (dtype == HFS_FLOAT32) {
            float f;
            memcpy(&f, &bytes[i * 4], 4);
            return f;
        }
        uint16_t h;
        memcpy(&h, &bytes[i * 2], 2);
        return from_bf16(h);
    }
    void set(size_t i, float value) {
        const uint16_t h = value != value ? 0x7fc0 : to_bf16(value);
        if (dtype == HFS_FLOAT32) memcpy(&bytes[i * 4], &value, 4);
        if (dtype == HFS_BFLOAT16) memcpy(&bytes[i * 2], &h, 2);
    }
};

// The steps of a weight in chunks of 16, in buffers of exactly the right size.
struct Chunks {
    std::unique_ptr<int32_t[]> start, column;
    std::unique_ptr<uint32_t[]> values;

    explicit Chunks(const hfs_weight& w) {
        const int64_t bands = w.out_features / w.height, per_step = w.kind == HFS_COUPLES ? 2 : 1;
        start.reset(new int32_t[(size_t)bands + 1]);
        start[0] = 0;
        for (int64_t b = 0; b < bands; b++) start[b + 1] = start[b] + (w.band_start[b + 1] - w.band_start[b] + 15) / 16;
        const size_t steps = (size_t)start[bands] * 16;
        column.reset(new int32_t[steps * per_step]);
        values.reset(new uint32_t[steps * w.height]());
        for (int64_t b = 0; b < bands; b++) {
            const int64_t n = w.band_start[b + 1] - w.band_start[b];
            for (int64_t j = 0; j < (n + 15) / 16 * 16; j++) {
                const int64_t from = w.band_start[b] + (j < n ? j : n - 1), chunk = start[b] + j / 16;
                for (int64_t i = 0; i < per_step; i++) {
                    column[(chunk * 16 + j % 16) * per_step + i] = w.column[from * per_step + i];
                }
                for (int64_t r = 0; r < w.height && j < n; r++) {
                    values[(chunk * w.height + r) * 16 + j % 16] = ((const uint32_t*)w.values)[from * w.height + r];
                }
            }
        }
    }
    void show(hfs_weight& w) const {
        w.chunk_start = start.get();
        w.chunk_column = column.get();
        w.chunk_values = values.get();
    }
};

struct Case {
    int out_features, in_features, height, width, isa, kind, dtype, form, tokens, activation, threads;
    bool bias;
    double density;
    unsigned seed;
};

void run(const Case& c) {
    std::mt19937 random(c.seed);
    std::uniform_real_distribution<float> number(-1, 1), chance(0, 1);
    const bool pairs = c.kind == HFS_NEIGHBOURS || c.kind == HFS_COUPLES;
    const int bands = c.out_features / c.height, per_step = pairs ? 2 : 1;
    std::vector<double> dense((size_t)c.out_features * c.in_features);
    std::vector<int32_t> start{0}, column;
    std::vector<uint32_t> values;
    for (int b = 0; b < bands; b++) {
        std::vector<int> kept;
        const int step = c.kind == HFS_NEIGHBOURS ? 2 : c.width;
        for (int k = 0; k + step <= c.in_features; k += step) {
            if (chance(random) >= c.density) continue;
            for (int i = 0; i < step; i++) kept.push_back(k + i);
        }
        const size_t filled = kept.size();
        if (c.kind == HFS_COUPLES && filled % 2) kept.push_back(kept.back());
        for (size_t j = 0; j < kept.size(); j += per_step) {
            if (j % c.width == 0) column.push_back(c.kind == HFS_NEIGHBOURS ? kept[j] / 2 : kept[j]);
            if (c.kind == HFS_COUPLES) column.push_back(kept[j + 1]);
            for (int r = 0; r < c.height; r++) {
                uint32_t word = 0;
                for (int half = 0; half < per_step; half++) {
                    float w = j + half < filled ? number(random) : 0.0f;
                    if (c.dtype == HFS_BFLOAT16) w = from_bf16(to_bf16(w));
                    dense[(size_t)(b * c.height + r) * c.in_features + kept[j + half]] += w;
                    if (!pairs) memcpy(&word, &w, 4);
                    if (pairs) word |= (uint32_t)to_bf16(w) << 16 * half;
                }
                values.push_back(word);
            }
        }
        start.push_back((int32_t)(column.size() / (c.kind == HFS_COUPLES ? 2 : 1)));
    }
    // Exact copies: a vector may own more than it shows.
    std::unique_ptr<int32_t[]> starts(new int32_t[start.size()]), columns(new int32_t[column.size()]);
    std::unique_ptr<uint32_t[]> words(new uint32_t[values.size()]);
    std::copy(start.begin(), start.end(), starts.get());
    std::copy(column.begin(), column.end(), columns.get());
    std::copy(values.begin(), values.end(), words.get());
    const int stride = c.in_features + (int)(c.seed % 3);
    Buffer x(c.dtype, c.tokens ? (size_t)(c.tokens - 1) * stride + c.in_features : 0);
    Buffer y(c.dtype, (size_t)c.tokens * c.out_features), bias(c.dtype, (size_t)c.out_features);
    for (size_t i = 0; i < x.size; i++) x.set(i, number(random));
    for (size_t i = 0; i < y.size; i++) y.set(i, NAN);
    for (size_t i = 0; i < bias.size; i++) bias.set(i, number(random));

    hfs_weight weight = {c.out_features, c.in_features, c.height, c.width, start.back(), 
                         starts.get(),   columns.get(), words.get(), c.kind,
                         c.dtype,        c.isa,         c.form,  nullptr, nullptr, nullptr};
    const Chunks chunks(weight);
    if (pairs && c.isa == HFS_AMX && c.seed % 7) chunks.show(weight);
    int status = hfs_check(&weight);
    if (!status) {
        status = hfs_linear(&weight, c.bias ? bias.bytes.get() : nullptr, x.bytes.get(), stride, y.bytes.get(),
                            c.tokens, c.activation, c.threads);
    }
    double worst = status ? INFINITY : 0;
    for (int m = 0; m < c.tokens && !status; m++) {
        for (int o = 0; o < c.out_features; o++) {
            double sum = c.bias ? bias.get(o) : 0, added = fabs(sum);
            for (int k = 0; k < c.in_features; k++) {
                const double term = dense[(size_t)o * c.in_features + k] * x.get((size_t)m * stride + k);
                sum += term;
                added += fabs(term);
            }
            sum = activate(sum, c.activation);
            const double tolerance = 2e-6 * (1 + added) + (c.dtype == HFS_BFLOAT16 ? fabs(sum) / 256 : 0);
            const double error = fabs(y.get((size_t)m * c.out_features + o) - sum) / tolerance;
            if (!(error <= worst)) worst = error;
        }
    }
    cases++;
    if (!(worst <= 1)) {
        failures++;
        printf("FAILED %dx%d height %d width %d isa %d kind %d dtype %d form %d tokens %d activation %d threads %d density %.1f "
               "bias %d: status %d, error %.3g of the tolerance\n",
               c.out_features, c.in_features, c.height, c.width, c.isa, c.kind, c.dtype, c.form, c.tokens, c.activation,
               c.threads, c.density, c.bias, status, worst);
    }
}

void expect(bool ok, const char* what) {
    cases++;
    if (!ok) {
        failures++;
        printf("FAILED %s\n", what);
    }
}

void refusals() {
    const int32_t start[] = {0, 1, 2}, column[] = {0, 3};
    const float values[] = {1, 2, 3, 4}, x[] = {1, 2, 3, 4};
    float y[4];
    const hfs_weight good = {4, 4, 2, 1, 2, start, column, values, HFS_SINGLE, HFS_FLOAT32, HFS_PORTABLE, HFS_AUTO,
                             nullptr, nullptr, nullptr};
    expect(hfs_check(&good) == HFS_OK, "a good weight");
    const auto bad = [&](auto change, int status, const char* what) {
        hfs_weight weight = good;
        change(weight);
        expect(hfs_check(&weight) == status, what);
    };
    const int32_t outside[] = {0, 4}, negative[] = {-1, 0}, falling[] = {0, 3, 2}, late[] = {1, 1, 2}, far[] = {0, 1, 3};
    bad([&](hfs_weight& w) { w.column = outside; }, HFS_BAD_INDEX, "a column outside");
    bad([&](hfs_weight& w) { w.column = negative; }, HFS_BAD_INDEX, "a negative column");
    bad([&](hfs_weight& w) { w.band_start = falling; }, HFS_BAD_INDEX, "falling band starts");
    bad([&](hfs_weight& w) { w.band_start = late; }, HFS_BAD_INDEX, "a first band start above 0");
    bad([&](hfs_weight& w) { w.band_start = far; }, HFS_BAD_INDEX, "a last band start above the steps");
    bad([&](hfs_weight& w) { w.height = 3; }, HFS_BAD_ARGUMENT, "a height that does not divide the rows");
    bad([&](hfs_weight& w) { w.height = 0; }, HFS_BAD_ARGUMENT, "a height of 0");
    bad([&](hfs_weight& w) { w.in_features = 1LL << 31; }, HFS_BAD_ARGUMENT, "too many columns");
    bad([&](hfs_weight& w) { w.steps = -1; }, HFS_BAD_ARGUMENT, "a negative number of steps");
    bad([&](hfs_weight& w) { w.column = nullptr; }, HFS_BAD_ARGUMENT, "no columns");
    bad([&](hfs_weight& w) { w.kind = HFS_COUPLES; }, HFS_BAD_ARGUMENT, "pairs of float32");
    bad([&](hfs_weight& w) { w.kind = 4; }, HFS_BAD_ARGUMENT, "an unknown kind");
    bad([&](hfs_weight& w) { w.width = 4; }, HFS_BAD_ARGUMENT, "a width of single columns");
    const auto segments = [&](int64_t width, int64_t features) {
        return [&, width, features](hfs_weight& w) {
            w.kind = HFS_SEGMENTS;
            w.height = 1;
            w.out_features = 2;
            w.width = width;
            w.in_features = features;
        };
    };
    bad(segments(4, 7), HFS_OK, "segments that end with the row");
    bad(segments(4, 6), HFS_BAD_INDEX, "a segment that leaves the row");
    bad(segments(4, 2), HFS_BAD_INDEX, "a segment longer than the row");
    bad(segments(8, 16), HFS_BAD_ARGUMENT, "segments wider than a register");
    bad(segments(2, 16), HFS_BAD_ARGUMENT, "segments of two");
    bad([&](hfs_weight& w) { w.isa = HFS_ISA_COUNT; }, HFS_NO_ISA, "an unknown instruction set");
    bad(
        [&](hfs_weight& w) {
            w.kind = HFS_NEIGHBOURS;
            w.dtype = HFS_BFLOAT16;
        },
        HFS_NO_ISA, "pairs for an instruction set without them");
    bad(
        [&](hfs_weight& w) {
            w.kind = HFS_NEIGHBOURS;
            w.dtype = HFS_BFLOAT16;
            w.isa = HFS_AVX512BF16;
            w.in_features = 5;
        },
        HFS_BAD_ARGUMENT, "neighbours in an odd number of columns");
    expect(hfs_weight_size() == sizeof good, "the size of a weight");
    // Chunks of two bands, of 17 steps and of none.
    std::vector<int32_t> steps(17, 1), chunk_column(32, 1);
    std::vector<uint32_t> words(64);
    const int32_t bands[] = {0, 17, 17}, chunks[] = {0, 2, 2}, few[] = {0, 1, 1}, shifted[] = {1, 3, 3};
    const auto tiles = [&](auto change, int status, const char* what) {
        bad(
            [&](hfs_weight& w) {
                w.kind = HFS_NEIGHBOURS;
                w.dtype = HFS_BFLOAT16;
                w.isa = HFS_AMX;
                w.steps = 17;
                w.band_start = bands;
                w.column = steps.data();
                w.values = words.data();
                w.chunk_start = chunks;
                w.chunk_column = chunk_column.data();
                w.chunk_values = words.data();
                change(w);
            },
            status, what);
    };
    tiles([](hfs_weight&) {}, HFS_OK, "good chunks");
    tiles([&](hfs_weight& w) { w.chunk_start = few; }, HFS_BAD_INDEX, "too few chunks");
    tiles([&](hfs_weight& w) { w.chunk_start = shifted; }, HFS_BAD_INDEX, "a first chunk above 0");
    tiles([&](hfs_weight& w) { w.chunk_values = nullptr; }, HFS_BAD_ARGUMENT, "chunks without values");
    tiles([&](hfs_weight& w) { w.isa = HFS_AVX512BF16; }, HFS_BAD_ARGUMENT, "chunks for a set without tiles");
    chunk_column[31] = 2;
    tiles([](hfs_weight&) {}, HFS_BAD_INDEX, "a chunk with a column outside");
    chunk_column[31] = -1;
    tiles([](hfs_weight&) {}, HFS_BAD_INDEX, "a chunk with a negative column");
    expect(hfs_linear(&good, nullptr, x, 4, y, -1, 0, 1) == HFS_BAD_ARGUMENT, "a negative number of tokens");
    expect(hfs_linear(&good, nullptr, x, 4, y, 1, 5, 1) == HFS_BAD_ARGUMENT, "an unknown activation");
    expect(hfs_linear(&good, nullptr, x, 4, y, 1, 0, 0) == HFS_BAD_ARGUMENT, "no threads");
}

}  // namespace

#include "encoder_test.cpp"
#include "prune_test.cpp"

int main() {
    refusals();
    hfs_set_parallel(fork_join);
    passes();
    encoders();
    const int shapes[][3] = {{16, 16, 1},  {34, 24, 2},  {36, 30, 4},  {40, 34, 8},  {48, 40, 16}, {64, 38, 32},
                             {33, 22, 3},  {72, 32, 24}, {48, 64, 48}, {66, 34, 33}, {1, 2, 1},    {200, 2, 8},
                             {14, 12, 7},  {40, 130, 8}, {0, 4, 8}, {8, 0, 8}};
    const int tokens[] = {0, 1, 2, 3, 5, 7, 8, 9, 13, 16, 17, 31, 49, 130};
    unsigned seed = 0;
    for (int isa = 0; isa < HFS_ISA_COUNT; isa++) {
        if (!hfs_isa_available(isa)) {
            printf("instruction set %d is not in this build\n", isa);
            continue;
        }
        const auto sweep = [&](int out_features, int in_features, int height, int width, int kind) {
            for (int m : tokens) {
                for (int form = HFS_AUTO; form <= HFS_LANES_FORM; form++) {
                    for (double density : {0.0, 0.2, 1.0}) {
                        seed++;
                        const bool pairs = kind == HFS_NEIGHBOURS || kind == HFS_COUPLES;
                        const int dtype = pairs ? HFS_BFLOAT16 : (int)(seed / 5 % 2);
                        run({out_features, in_features, height, width, isa, kind, dtype, form, m, (int)(seed % 5), 1,
                             seed % 4 != 0, density, seed});
                    }
                }
            }
        };
        const int last = isa >= HFS_AVX512BF16 ? HFS_COUPLES : HFS_SINGLE;
        for (const auto& shape : shapes) {
            for (int kind = 0; kind <= last; kind++) sweep(shape[0], shape[1], shape[2], 1, kind);
        }
        for (int width = 4; width <= (isa == HFS_PORTABLE ? 4 : isa == HFS_AVX2 ? 8 : 16); width *= 2) {
            sweep(37, 64, 1, width, HFS_SEGMENTS);
            sweep(16, 3 * width, 1, width, HFS_SEGMENTS);
            sweep(3, 1024, 1, width, HFS_SEGMENTS);
        }
        // Enough work for threads to share, with few and with many groups of tokens.
        for (int kind = 0; kind <= last; kind++) {
            for (int m : {10, 40, 500}) {
                for (int form : {HFS_ROWS, HFS_LANES_FORM}) {
                    seed++;
                    run({264, 200, 8, 1, isa, kind, kind ? HFS_BFLOAT16 : HFS_FLOAT32, form, m, HFS_NONE, 3, true, 0.9,
                         seed});
                }
            }
        }
        run({264, 200, 1, 4, isa, HFS_SEGMENTS, HFS_FLOAT32, HFS_AUTO, 300, HFS_NONE, 3, true, 0.9, ++seed});
        run({264, 512, 1, 4, isa, HFS_SEGMENTS, HFS_BFLOAT16, HFS_AUTO, 9, HFS_GELU, 3, true, 0.9, ++seed});
    }
    printf("%d cases, %d failures\n", cases, failures);
    return failures != 0;
}
