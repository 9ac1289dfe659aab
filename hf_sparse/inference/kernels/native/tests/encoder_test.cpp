// Encoders against sums in double, in buffers of exactly the right size. Included by kernels_test.cpp, whose helpers it
// uses.

namespace {

template <typename T>
std::unique_ptr<T[]> exactly(const std::vector<T>& from) {
    std::unique_ptr<T[]> copy(new T[from.size()]);
    std::copy(from.begin(), from.end(), copy.get());
    return copy;
}

typedef std::vector<double> Doubles;

// A random weight with its bias, for C and for sums in double.
struct RandomWeight {
    std::unique_ptr<int32_t[]> start, column;
    std::unique_ptr<uint32_t[]> words;
    std::unique_ptr<float[]> bias;
    std::unique_ptr<Chunks> chunks;
    Doubles dense;
    hfs_weight weight;

    RandomWeight(int rows, int columns, int height, int kind, int dtype, int isa, std::mt19937& random) {
        std::uniform_real_distribution<float> number(-1, 1), chance(0, 1);
        const bool pairs = kind != HFS_SINGLE;
        const double density = random() % 4 ? random() % 10 / 9.0 : 1;
        const float scale = 1.5f / sqrtf((float)(columns * density + 1));
        std::vector<int32_t> starts{0}, all;
        std::vector<uint32_t> values;
        dense.assign((size_t)rows * columns, 0);
        for (int b = 0; b < rows / height; b++) {
            std::vector<int> kept;
            const int step = kind == HFS_NEIGHBOURS ? 2 : 1;
            for (int k = 0; k + step <= columns; k += step) {
                const bool keep = chance(random) < density;
                for (int i = 0; i < step && keep; i++) kept.push_back(k + i);
            }
            const size_t filled = kept.size();
            if (kind == HFS_COUPLES && filled % 2) kept.push_back(kept.back());
            for (size_t j = 0; j < kept.size(); j += pairs ? 2 : 1) {
                all.push_back(kind == HFS_NEIGHBOURS ? kept[j] / 2 : kept[j]);
                if (kind == HFS_COUPLES) all.push_back(kept[j + 1]);
                for (int r = 0; r < height; r++) {
                    uint32_t word = 0;
                    for (int half = 0; half < (pairs ? 2 : 1); half++) {
                        float w = j + half < filled ? number(random) * scale : 0.0f;
                        if (dtype == HFS_BFLOAT16) w = from_bf16(to_bf16(w));
                        dense[(size_t)(b * height + r) * columns + kept[j + half]] += w;
                        if (!pairs) memcpy(&word, &w, 4);
                        if (pairs) word |= (uint32_t)to_bf16(w) << 16 * half;
                    }
                    values.push_back(word);
                }
            }
            starts.push_back((int32_t)(all.size() / (kind == HFS_COUPLES ? 2 : 1)));
        }
        start = exactly(starts);
        column = exactly(all);
        words = exactly(values);
        weight = {rows, columns, height, 1,   starts.back(), start.get(), column.get(), words.get(),
                  kind, dtype,   isa,    HFS_AUTO, nullptr,  nullptr,     nullptr};
        if (pairs && isa == HFS_AMX && random() % 4) {
            chunks.reset(new Chunks(weight));
            chunks->show(weight);
        }
        if (random() % 5) {
            bias.reset(new float[rows]);
            for (int i = 0; i < rows; i++) bias[i] = number(random);
        }
    }
};

struct EncoderCase {
    int isa, dtype;
    bool pairs;
    int batch, length, heads, head_size, hidden, inner, layers, threads;
    bool position_bias;
    unsigned seed;
};

// What the kernels of pairs round before they multiply.
double rounded(double x, bool pairs) { return pairs ? from_bf16(to_bf16((float)x)) : x; }

Doubles apply(const RandomWeight& w, const Doubles& x, int tokens, bool pairs) {
    const int rows = (int)w.weight.out_features, columns = (int)w.weight.in_features;
    Doubles y((size_t)tokens * rows);
    for (int t = 0; t < tokens; t++) {
        for (int o = 0; o < rows; o++) {
            double sum = w.bias ? w.bias[o] : 0;
            for (int k = 0; k < columns; k++) {
                sum += w.dense[(size_t)o * columns + k] * rounded(x[(size_t)t * columns + k], pairs);
            }
            y[(size_t)t * rows + o] = sum;
        }
    }
    return y;
}

void add_and_normalise(Doubles& h, const Doubles& y, int tokens, int hidden, const float* gain, const float* shift,
                       double eps) {
    for (int t = 0; t < tokens; t++) {
        double mean = 0, variance = 0, *row = &h[(size_t)t * hidden];
        for (int k = 0; k < hidden; k++) mean += (row[k] += y[(size_t)t * hidden + k]) / hidden;
        for (int k = 0; k < hidden; k++) variance += (row[k] - mean) * (row[k] - mean) / hidden;
        for (int k = 0; k < hidden; k++) row[k] = (row[k] - mean) / sqrt(variance + eps) * gain[k] + shift[k];
    }
}

// softmax(q k' * scale + mask + bias) v of one sequence.
Doubles attend(const EncoderCase& c, const Doubles& q, const Doubles& k, const Doubles& v, const float* mask,
               const Doubles& bias) {
    const int width = c.heads * c.head_size;
    Doubles out((size_t)c.length * width), scores(c.length);
    for (int head = 0; head < c.heads; head++) {
        for (int i = 0; i < c.length; i++) {
            double top = -INFINITY, sum = 0;
            for (int j = 0; j < c.length; j++) {
                double score = 0;
                for (int d = head * c.head_size; d < (head + 1) * c.head_size; d++) {
                    score += rounded(q[(size_t)i * width + d], c.pairs) * rounded(k[(size_t)j * width + d], c.pairs);
                }
                score = score / sqrt((double)c.head_size) + (mask ? mask[j] : 0);
                if (!bias.empty()) score += bias[((size_t)head * c.length + j) * c.length + i];
                scores[j] = score;
                if (score > top) top = score;
            }
            for (int j = 0; j < c.length; j++) {
                const double weight = exp(scores[j] - top);
                sum += weight;
                for (int d = head * c.head_size; d < (head + 1) * c.head_size; d++) {
                    out[(size_t)i * width + d] += rounded(weight, c.pairs) * rounded(v[(size_t)j * width + d], c.pairs);
                }
            }
            for (int d = head * c.head_size; d < (head + 1) * c.head_size; d++) out[(size_t)i * width + d] /= sum;
        }
    }
    return out;
}

void run(const EncoderCase& c) {
    std::mt19937 random(c.seed);
    std::uniform_real_distribution<float> number(-1, 1);
    const int width = c.heads * c.head_size, activation = 1 + (int)(c.seed % 4);
    const int dims[6][2] = {{width, c.hidden}, {width, c.hidden},   {width, c.hidden},
                            {c.hidden, width}, {c.inner, c.hidden}, {c.hidden, c.inner}};
    std::vector<std::unique_ptr<RandomWeight>> weights;
    std::vector<std::unique_ptr<float[]>> norms;
    std::unique_ptr<hfs_encoder_layer[]> layers(new hfs_encoder_layer[c.layers]);
    for (int l = 0; l < c.layers; l++) {
        for (int i = 0; i < 6; i++) {
            int height = 1 << random() % 6;
            while (dims[i][0] % height) height /= 2;
            if (c.pairs && height < 2) height = 2;
            const int kind = !c.pairs ? HFS_SINGLE : random() % 2 && dims[i][1] % 2 == 0 ? HFS_NEIGHBOURS : HFS_COUPLES;
            weights.emplace_back(new RandomWeight(dims[i][0], dims[i][1], height, kind, c.dtype, c.isa, random));
            layers[l].weight[i] = &weights.back()->weight;
            layers[l].bias[i] = weights.back()->bias.get();
        }
        for (int i = 0; i < 4; i++) {
            norms.emplace_back(new float[c.hidden]);
            for (int k = 0; k < c.hidden; k++) norms.back()[k] = number(random) * 0.3f + (i % 2 ? 0.0f : 1.0f);
            layers[l].norm[i] = norms.back().get();
        }
    }
    const hfs_encoder encoder = {c.layers,
                                 c.hidden,
                                 c.heads,
                                 c.head_size,
                                 c.inner,
                                 layers.get(),
                                 (float)(1 / sqrt((double)c.head_size)),
                                 {1e-12f, 1e-5f},
                                 activation,
                                 c.dtype,
                                 c.isa};
    const size_t size = (size_t)c.batch * c.length * c.hidden;
    Buffer x(c.dtype, size), y(c.dtype, size);
    for (size_t i = 0; i < size; i++) x.set(i, number(random) * 2);
    for (size_t i = 0; i < size; i++) y.set(i, NAN);
    std::unique_ptr<float[]> mask(new float[(size_t)c.batch * c.length]);
    const int kind = (int)(random() % 4);  // none, left, right, added
    for (int b = 0; b < c.batch; b++) {
        const int hidden = (int)(random() % c.length);
        for (int i = 0; i < c.length; i++) {
            const bool masked = kind == 1 ? i < hidden : kind == 2 && i >= c.length - hidden;
            mask[(size_t)b * c.length + i] = masked ? -INFINITY : kind == 3 ? number(random) * 2 : 0;
        }
    }
    const int padded = (c.length + 15) / 16 * 16;
    std::unique_ptr<float[]> bias(c.position_bias ? new float[(size_t)c.heads * padded * padded]() : nullptr);
    Doubles added(c.position_bias ? (size_t)c.heads * c.length * c.length : 0);
    for (size_t i = 0; i < added.size(); i++) {
        const size_t head = i / c.length / c.length, key = i / c.length % c.length, query = i % c.length;
        added[i] = number(random) * 2;
        bias[(head * padded + key) * padded + query] = (float)(added[i] / encoder.scale);
    }

    int status = hfs_encoder_check(&encoder);
    if (!status) {
        status = hfs_encoder_run(&encoder, x.bytes.get(), y.bytes.get(), c.batch, c.length, kind ? mask.get() : nullptr,
                                 bias.get(), c.threads);
    }
    double worst = status ? INFINITY : 0;
    for (int b = 0; b < c.batch && !status; b++) {
        const size_t first = (size_t)b * c.length * c.hidden;
        Doubles h((size_t)c.length * c.hidden);
        for (size_t i = 0; i < h.size(); i++) h[i] = x.get(first + i);
        for (int l = 0; l < c.layers; l++) {
            const auto linear = [&](int i, const Doubles& in) { return apply(*weights[l * 6 + i], in, c.length, c.pairs); };
            const float* const* norm = layers[l].norm;
            const Doubles mixed = attend(c, linear(0, h), linear(1, h), linear(2, h),
                                         kind ? mask.get() + (size_t)b * c.length : nullptr, added);
            add_and_normalise(h, linear(3, mixed), c.length, c.hidden, norm[0], norm[1], 1e-12);
            Doubles between = linear(4, h);
            for (double& value : between) value = activate(value, activation);
            add_and_normalise(h, linear(5, between), c.length, c.hidden, norm[2], norm[3], 1e-5);
        }
        double largest = 0;
        for (double value : h) largest = fmax(largest, fabs(value));
        for (size_t i = 0; i < h.size(); i++) {
            // Of the largest value: sums of float32, or roundings of pairs that fall the other way; then the result's own.
            const double tolerance = largest * (c.pairs ? 1.0 / 128 : 2e-5) + (c.dtype ? fabs(h[i]) / 256 : 0);
            const double error = fabs(y.get(first + i) - h[i]) / tolerance;
            if (!(error <= worst)) worst = error;
        }
    }
    cases++;
    if (!(worst <= 1)) {
        failures++;
        printf("FAILED encoder isa %d dtype %d pairs %d batch %d length %d heads %d x %d hidden %d inner %d layers %d "
               "threads %d bias %d mask %d seed %u: status %d, error %.3g of the tolerance\n",
               c.isa, c.dtype, c.pairs, c.batch, c.length, c.heads, c.head_size, c.hidden, c.inner, c.layers, c.threads,
               c.position_bias, kind, c.seed, status, worst);
    }
}

void encoder_refusals() {
    std::mt19937 random(1);
    std::vector<std::unique_ptr<RandomWeight>> weights;
    const int dims[6][2] = {{8, 6}, {8, 6}, {8, 6}, {6, 8}, {10, 6}, {6, 10}};
    const float norm[6] = {1, 1, 1, 1, 1, 1};
    hfs_encoder_layer layer = {};
    for (int i = 0; i < 6; i++) {
        weights.emplace_back(new RandomWeight(dims[i][0], dims[i][1], 2, HFS_SINGLE, HFS_FLOAT32, HFS_PORTABLE, random));
        layer.weight[i] = &weights[i]->weight;
    }
    for (const float*& one : layer.norm) one = norm;
    const hfs_encoder good = {1, 6, 1, 8, 10, &layer, 0.5f, {1e-5f, 1e-5f}, HFS_GELU, HFS_FLOAT32, HFS_PORTABLE};
    expect(hfs_encoder_check(&good) == HFS_OK, "a good encoder");
    const auto bad = [&](auto change, const char* what) {
        hfs_encoder encoder = good;
        hfs_encoder_layer own = layer;
        encoder.layer = &own;
        change(encoder, own);
        expect(hfs_encoder_check(&encoder) != HFS_OK, what);
    };
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.layers = 0; }, "an encoder without layers");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.hidden = 8; }, "another number of hidden features");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.hidden = 7; }, "an odd number of hidden features");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.heads = 2; }, "another number of heads");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.heads = -1, e.head_size = -8; }, "a negative number of heads");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.heads = 2, e.head_size = 4; }, "a head of four features");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.intermediate = 8; }, "another number of inner features");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.scale = 0; }, "a scale of 0");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.scale = NAN; }, "a scale of NaN");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.activation = 5; }, "an unknown activation of an encoder");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.dtype = HFS_BFLOAT16; }, "another dtype than the weights");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.isa = HFS_AVX2; }, "another instruction set than the weights");
    bad([](hfs_encoder& e, hfs_encoder_layer&) { e.isa = -1; }, "a negative instruction set");
    bad([](hfs_encoder&, hfs_encoder_layer& l) { l.norm[3] = nullptr; }, "no shift");
    bad([](hfs_encoder&, hfs_encoder_layer& l) { l.weight[4] = l.weight[5]; }, "weights in the wrong order");
    float x[12] = {}, y[12];
    const float masked[2] = {-INFINITY, -INFINITY};
    const auto call = [&](int64_t batch, int64_t length, const float* mask, int threads) {
        return hfs_encoder_run(&good, x, y, batch, length, mask, nullptr, threads);
    };
    expect(call(1, 2, nullptr, 1) == HFS_OK, "a call of an encoder");
    expect(call(0, 2, nullptr, 1) == HFS_OK && call(1, 0, nullptr, 1) == HFS_OK, "an encoder without tokens");
    expect(call(1, 2, masked, 1) == HFS_ALL_MASKED, "a sequence that is masked as a whole");
    expect(call(-1, 2, nullptr, 1) == HFS_BAD_ARGUMENT && call(1, -2, nullptr, 1) == HFS_BAD_ARGUMENT, "negative sizes");
    expect(call(1 << 20, 1 << 20, nullptr, 1) == HFS_BAD_ARGUMENT, "too many tokens");
    expect(call(1, 2, nullptr, 0) == HFS_BAD_ARGUMENT, "an encoder on no threads");
}

void encoders() {
    encoder_refusals();
    const int tokens[][2] = {{1, 1}, {1, 15}, {2, 17}, {3, 5}, {1, 33}, {2, 50}, {1, 130}, {9, 9}, {5, 16}, {1, 150}};
    const int heads[][2] = {{1, 8}, {2, 8}, {1, 16}, {3, 24}, {1, 40}, {2, 32}};
    const int hidden[] = {8, 16, 18, 34, 40}, inner[] = {16, 33, 40, 70};
    for (int isa = 0; isa < HFS_ISA_COUNT; isa++) {
        if (!hfs_isa_available(isa)) continue;
        for (unsigned seed = 0; seed < 60; seed++) {
            const bool pairs = isa >= HFS_AVX512BF16 && seed % 3;
            const int dtype = pairs || seed % 2 ? HFS_BFLOAT16 : HFS_FLOAT32;
            const int features = inner[seed % 4], odd = pairs ? features % 2 : 0;
            run(EncoderCase{isa, dtype, pairs, tokens[seed % 10][0], tokens[seed % 10][1], heads[seed % 6][0],
                            heads[seed % 6][1], hidden[seed / 2 % 5], features - odd, 1 + (int)(seed % 2),
                            1 + (int)(seed / 3 % 3), seed % 5 == 1, seed});
        }
    }
}

}  // namespace
